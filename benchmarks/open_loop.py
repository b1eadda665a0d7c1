"""HTTP clients on one event loop that send films to an endpoint: at set moments, or one after the other; and what they saw."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from ssacl.data.quiet import quiet_loggers

MOST_REQUESTS = 6000
"""In one call: a load test must end."""
SHED = (429, 503)
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Answer:
    """Of one request."""

    due_s: float
    """When it was to be sent, from the start of the load."""
    took_s: float
    """From that moment to the whole answer, so that a client that falls behind makes nothing look fast."""
    status: int
    """0: the connection broke off or the time was up."""
    says_when: bool
    """A Retry-After came with it."""

    @property
    def is_shed(self) -> bool:
        """Refused as the interface promises: come back later."""
        return self.status in SHED and self.says_when


def poisson_moments(rate_per_s: float, seconds: float, seed: int) -> list[float]:
    """Moments of a Poisson process, from 0 to `seconds`."""
    chance, moments, now = random.Random(seed), list[float](), 0.0
    while (now := now + chance.expovariate(rate_per_s)) < seconds and len(moments) < MOST_REQUESTS:
        moments.append(now)
    return moments


async def open_loop(url: str, films: Sequence[bytes], moments: Sequence[float]) -> list[Answer]:
    """Send a film at each moment, whatever has become of those before; returns when all are answered."""
    async with _client() as client:
        start = time.monotonic()

        async def one(due_s: float, film: bytes) -> Answer:
            await asyncio.sleep(start + due_s - time.monotonic())
            return await _send(client, url, film, start, due_s)

        return await asyncio.gather(*(one(due_s, film) for due_s, film in zip(moments, itertools.cycle(films), strict=False)))


async def closed_loop(url: str, films: Sequence[bytes], num_clients: int, seconds: float) -> list[Answer]:
    """Clients that each send the next film when the last is answered; returns when all are answered."""
    answers: list[Answer] = []
    turn = itertools.cycle(films)
    async with _client() as client:
        start = time.monotonic()

        async def one() -> None:
            while (now_s := time.monotonic() - start) < seconds and len(answers) < MOST_REQUESTS:
                answers.append(await _send(client, url, next(turn), start, now_s))

        await asyncio.gather(*(one() for _ in range(num_clients)))
    return answers


def seen(answers: Sequence[Answer]) -> dict[str, Any]:
    """Figures of a load: what was answered, what was shed, what failed, and how long the answered ones took."""
    took_s = [answer.took_s for answer in answers if answer.status == 200]
    num_shed = sum(answer.is_shed for answer in answers)
    # From the first request to the last answer: what the endpoint had time for.
    span_s = max(answer.due_s + answer.took_s for answer in answers) - min(answer.due_s for answer in answers)
    p50, p95, p99 = (round(float(value), 3) for value in np.percentile(took_s, (50, 95, 99))) if took_s else (None, None, None)
    return {
        "requests": len(answers),
        "answered_per_s": round(len(took_s) / span_s, 3),
        "p50_s": p50,
        "p95_s": p95,
        "p99_s": p99,
        "shed_share": round(num_shed / len(answers), 4),
        "failed": len(answers) - len(took_s) - num_shed,
    }


def _client() -> httpx.AsyncClient:
    # Below its warnings httpx tells every request.
    quiet_loggers("httpx", "httpcore")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    return httpx.AsyncClient(timeout=_TIMEOUT_S, limits=limits, trust_env=False, headers={"content-type": "application/dicom"})


async def _send(client: httpx.AsyncClient, url: str, film: bytes, start: float, due_s: float) -> Answer:
    try:
        answer = await client.post(url, content=film)
        status, says_when = answer.status_code, "retry-after" in answer.headers
    except httpx.HTTPError:
        status, says_when = 0, False
    return Answer(due_s, time.monotonic() - start - due_s, status, says_when)
