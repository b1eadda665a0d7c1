"""The limit of requests under way follows the latency: a queue that would be too long is never let in, and room is found when there is."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest

from serve.admission import Admission


@dataclass
class Station:
    """Arrivals at random, so many replicas that take `service_s` a request, first come first served, all by a clock of its own."""

    admission: Admission
    replicas: int
    service_s: float = 1.0
    now: float = 0.0
    took_s: list[float] = field(default_factory=list)
    shed: int = 0
    _free_at: list[float] = field(default_factory=list)
    _open: list[tuple[float, float]] = field(default_factory=list)

    def run(self, rate: float, requests: int, seed: int = 0) -> None:
        chance = random.Random(seed)
        self._free_at = [self.now] * self.replicas
        self.took_s, self.shed = [], 0
        for _ in range(requests):
            arrives = self.now + chance.expovariate(rate)
            self._answer(until=arrives)
            self.now = arrives
            if not self.admission.enter():
                self.shed += 1
                continue
            begins = max(self.now, heapq.heappop(self._free_at))
            heapq.heappush(self._free_at, begins + self.service_s)
            heapq.heappush(self._open, (begins + self.service_s, arrives))
        self._answer(until=float("inf"))

    def _answer(self, until: float) -> None:
        while self._open and self._open[0][0] <= until:
            self.now, arrived = heapq.heappop(self._open)
            self.took_s.append(self.now - arrived)
            self.admission.leave(self.now - arrived)


def station(target_s: float | None, replicas: int = 1) -> Station:
    built = Station(Admission(target_s, 8, clock=lambda: built.now), replicas)
    return built


@pytest.mark.parametrize("replicas", [1, 4])
def test_overload_keeps_the_latency_and_the_replicas_busy(replicas: int) -> None:
    place = station(2.5, replicas)
    place.run(rate=3.0 * replicas, requests=3000)
    late = sorted(place.took_s)[int(0.95 * len(place.took_s))]
    assert late <= 3.5
    assert place.shed > 1500, "two thirds of what comes cannot be served"
    assert len(place.took_s) / place.now > 0.85 * replicas, "and yet no replica waits for work"


def test_without_a_target_everything_is_let_in() -> None:
    place = station(None)
    place.run(rate=3.0, requests=200)
    assert place.shed == 0
    assert max(place.took_s) > 50


def test_a_light_load_is_never_shed() -> None:
    place = station(4.0)
    place.run(rate=0.3, requests=300)
    assert place.shed == 0


def test_more_replicas_are_noticed() -> None:
    place = station(2.5, 1)
    place.run(rate=9.0, requests=1500)
    few = place.admission.limit
    place.replicas = 4
    place.run(rate=9.0, requests=3000)
    assert place.admission.limit >= 2 * few


def test_one_is_always_let_in() -> None:
    admission = Admission(0.1, 5)
    for _ in range(50):
        assert admission.enter()
        admission.leave(99.0)
    assert admission.limit >= 1
