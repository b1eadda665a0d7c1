"""Replicas that come with the load and go after it: a timeline of a real Ray Serve endpoint, and its picture."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import serve

from benchmarks.gateway_chaos import SEED
from benchmarks.open_loop import Answer, open_loop, poisson_moments, seen
from serve.app import APPLICATION, run_server
from serve.settings import ServeSettings

logger = logging.getLogger("serve_load")
_LOOK_EVERY_S = 0.5
_GIVE_UP_S = 120.0
"""After the load: what has not gone by then stays."""


@dataclass
class Timeline:
    """Of one run, in seconds from its start."""

    replicas: list[tuple[float, int]] = field(default_factory=list)
    """Model replicas that run, at each look."""
    load_ends_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    def changes(self) -> list[tuple[float, int]]:
        """The looks at which the number was another one."""
        before = [None, *(count for _, count in self.replicas[:-1])]
        return [(at_s, count) for (at_s, count), last in zip(self.replicas, before, strict=True) if count != last]


def scaling(settings: ServeSettings, films: Sequence[bytes], rate_per_s: float, seconds: float) -> tuple[dict[str, Any], Timeline]:
    """Load for four times `seconds`, as replicas are slow to start, then silence until one is left: figures, and what was seen."""
    with run_server(settings, blocking=False) as server:
        timeline = asyncio.run(_watched(f"{server.url}/v1/reports", films, poisson_moments(rate_per_s, 4 * seconds, SEED)))
    changes = timeline.changes()
    most = max(count for _, count in changes)
    rises = [at_s for at_s, count in changes if count > 1 and at_s <= timeline.load_ends_s]
    figures = {
        **seen(timeline.answers),
        "offered_per_s": round(rate_per_s, 3),
        "replicas": changes,
        "load_ends_s": round(timeline.load_ends_s, 1),
        "most_replicas": most,
        "second_replica_after_s": rises[0] if rises else None,
        "replicas_at_end": changes[-1][1],
        "back_to_one_s_after_load": round(changes[-1][0] - timeline.load_ends_s, 1) if most > 1 else None,
    }
    return figures, timeline


async def _watched(url: str, films: Sequence[bytes], moments: Sequence[float]) -> Timeline:
    timeline, start = Timeline(), time.monotonic()

    async def look() -> int:
        status = await asyncio.to_thread(serve.status)
        count = status.applications[APPLICATION].deployments["model"].replica_states.get("RUNNING", 0)
        timeline.replicas.append((round(time.monotonic() - start, 1), count))
        await asyncio.sleep(_LOOK_EVERY_S)
        return count

    load = asyncio.create_task(open_loop(url, films, moments))
    while not load.done():
        await look()
    timeline.answers, timeline.load_ends_s = await load, time.monotonic() - start
    logger.info("the load has ended, %d replicas", timeline.replicas[-1][1])
    while await look() > 1 and time.monotonic() - start < timeline.load_ends_s + _GIVE_UP_S:
        pass
    return timeline


def draw(timeline: Timeline, path: Path) -> None:
    """Replicas, requests and latency over time, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    count_axes, rate_axes, took_axes = figure.subplots(3, sharex=True)
    count_axes.step(*zip(*timeline.replicas, strict=True), where="post", color="tab:blue")
    count_axes.set_ylabel("model replicas")
    answered = [answer for answer in timeline.answers if answer.status == 200]
    seconds = range(0, int(timeline.load_ends_s) + 6, 5)
    for label, moments in (
        ("sent", [answer.due_s for answer in timeline.answers]),
        ("answered", [answer.due_s + answer.took_s for answer in answered]),
    ):
        rate_axes.plot(seconds, [sum(second <= at < second + 5 for at in moments) / 5 for second in seconds], label=label)
    rate_axes.set_ylabel("requests/s")
    rate_axes.legend()
    took_axes.plot([answer.due_s for answer in answered], [answer.took_s for answer in answered], ".", markersize=2)
    took_axes.set_ylabel("s until answered")
    took_axes.set_xlabel("s")
    for axes in (count_axes, rate_axes, took_axes):
        axes.axvline(timeline.load_ends_s, color="grey", linestyle=":")
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=80)
