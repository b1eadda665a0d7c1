"""Requests for `benchmarks/serve_load.py`: one after another, as many at once as asked, or at random moments whatever the answers do."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np


@dataclass(frozen=True)
class Answer:
    """One request's end. `status` 0: no answer at all."""

    sent_s: float
    took_s: float
    status: int
    retry_after: bool


@dataclass(frozen=True)
class Load:
    """What a phase of load brought."""

    answers: list[Answer]
    seconds: float

    @property
    def accepted_s(self) -> list[float]:
        return [answer.took_s for answer in self.answers if answer.status == 200]

    def figures(self) -> dict[str, Any]:
        shed = [answer for answer in self.answers if answer.status in (429, 503)]
        others = [answer.status for answer in self.answers if answer.status not in (200, 429, 503)]
        return {
            "requests": len(self.answers),
            "reports_per_s": round(len(self.accepted_s) / self.seconds, 3),
            **percentiles_ms(self.accepted_s),
            "shed_share": round(len(shed) / max(1, len(self.answers)), 4),
            "shed_with_retry_after": all(answer.retry_after for answer in shed),
            "failed": len(others),
        }


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds; None where nothing was accepted."""
    values = np.percentile(seconds, (50, 95, 99)) if seconds else [None] * 3
    return {
        f"p{share}_ms": None if value is None else round(1e3 * float(value), 1) for share, value in zip((50, 95, 99), values, strict=True)
    }


class Client:
    """Sends films to an endpoint.

    Parameters
    ----------
    url
        Of `POST /v1/reports`.
    films
        Encoded films, sent in turns.
    """

    def __init__(self, url: str, films: Sequence[bytes]) -> None:
        self._url, self._films, self._sent = f"{url}/v1/reports?maps=false", films, 0

    def one_by_one(self, count: int) -> Load:
        """The latency of an endpoint that has nothing else to do."""
        return self._run(lambda client, begun: self._closed(client, begun, 1, lambda done: done >= count))

    def saturated(self, at_once: int, seconds: float) -> Load:
        """So many requests under way all the time: the most that the endpoint does."""
        return self._run(lambda client, begun: self._closed(client, begun, at_once, lambda _: time.monotonic() - begun >= seconds))

    def poisson(self, rate: float, seconds: float, seed: int = 0) -> Load:
        """Requests at random moments, `rate` a second, sent whether or not earlier ones are answered."""
        return self._run(lambda client, begun: self._open(client, begun, rate, seconds, random.Random(seed)))

    def _run(self, phase: Callable[[httpx.AsyncClient, float], Awaitable[list[Answer]]]) -> Load:
        async def run() -> Load:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
            async with httpx.AsyncClient(timeout=120, limits=limits) as client:
                begun = time.monotonic()
                answers = await phase(client, begun)
                return Load(answers, time.monotonic() - begun)

        return asyncio.run(run())

    async def _closed(self, client: httpx.AsyncClient, begun: float, at_once: int, over: Callable[[int], bool]) -> list[Answer]:
        answers: list[Answer] = []

        async def chain() -> None:
            while not over(len(answers)):
                answers.append(await self._send(client, begun))

        await asyncio.gather(*(chain() for _ in range(at_once)))
        return answers

    async def _open(self, client: httpx.AsyncClient, begun: float, rate: float, seconds: float, chance: random.Random) -> list[Answer]:
        tasks = []
        due = chance.expovariate(rate)
        while due < seconds:
            # Each at its own moment, not so long after the one before: a late sender must not thin the load.
            await asyncio.sleep(max(0.0, begun + due - time.monotonic()))
            tasks.append(asyncio.create_task(self._send(client, begun)))
            due += chance.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    async def _send(self, client: httpx.AsyncClient, begun: float) -> Answer:
        film = self._films[self._sent % len(self._films)]
        self._sent += 1
        started = time.monotonic()
        status, retry_after = 0, False
        try:
            answer = await client.post(self._url, content=film, headers={"content-type": "image/png"})
            status, retry_after = answer.status_code, "retry-after" in answer.headers
        except httpx.TransportError:
            pass
        return Answer(started - begun, time.monotonic() - started, status, retry_after)
