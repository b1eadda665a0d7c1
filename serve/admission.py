"""How many requests may be under way at once, learned from how long they take; knows neither Ray nor HTTP.

A fixed queue is too long for a slow model and too short for many replicas. So the limit follows the latency: it rises slowly while
requests keep their target, and falls by a quarter when they do not (additive increase, multiplicative decrease).
"""

from __future__ import annotations

import time
from collections.abc import Callable

_BACK_OFF = 0.75
_RISE = 0.25
"""Requests that the limit rises by in a round. In the tests' simulation a third of what is let in is late with 1, a fifth so."""
_COMFORT = 0.8
"""Share of the target up to which the limit still rises."""


class Admission:
    """The limit of one ingress replica.

    Parameters
    ----------
    target_s
        How long an accepted request should take at most; None: every request is let in.
    first_limit
        Where the limit starts.
    clock
        Seconds that never fall.
    """

    def __init__(self, target_s: float | None, first_limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._target_s, self._limit, self._clock = target_s, max(1.0, first_limit), clock
        self._under_way = 0
        self._lowered_at = -float("inf")

    @property
    def limit(self) -> int:
        """Requests that may be under way now."""
        return int(self._limit)

    def enter(self) -> bool:
        """Let a request in, if there is room; each one that was let in must `leave`."""
        if self._target_s is not None and self._under_way >= self.limit:
            return False
        self._under_way += 1
        return True

    def leave(self, took_s: float) -> None:
        """A request that was let in has been answered, or has failed, after `took_s`."""
        was_under_way = self._under_way
        self._under_way -= 1
        if self._target_s is None:
            return
        if took_s > self._target_s:
            # Those that were let in before the limit fell are late too, and say nothing new.
            if self._clock() - self._lowered_at >= self._target_s:
                self._limit = max(1.0, min(self._limit, was_under_way) * _BACK_OFF)
                self._lowered_at = self._clock()
        elif took_s < _COMFORT * self._target_s and was_under_way >= self.limit:
            self._limit += _RISE / self._limit
