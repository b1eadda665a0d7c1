"""Requests that wait are read together; knows neither Ray nor a model.

Serve's own `serve.batch` closes a batch a moment after its first request, also while the batch before is still being read: under load, what
comes one by one is frozen into batches of one, which wait in a row. Here a batch is closed when the model is free for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Outcome = TypeVar("Outcome")


class Batches(Generic[Asked, Outcome]):
    """Collects what is asked for, for one batch at a time.

    Parameters
    ----------
    read
        What was asked -> as many outcomes; called in a thread.
    """

    def __init__(self, read: Callable[[list[Asked]], list[Outcome]]) -> None:
        self.max_batch_size, self.wait_s = 1, 0.0
        """Most at once, and how long the first of them waits for others where nothing is being read."""
        self.busy_since: float | None = None
        """`time.monotonic()` of when the batch that is being read was begun."""
        self._read = read
        self._waiting: deque[tuple[Asked, float, asyncio.Future[Outcome]]] = deque()
        self._work: asyncio.Task[None] | None = None

    async def outcome(self, asked: Asked) -> Outcome:
        """The outcome of one request; an error of `read` is raised for each request of its batch."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, time.monotonic(), future))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._read_all())
        return await future

    async def _read_all(self) -> None:
        while self._waiting:
            left_s = self._waiting[0][1] + self.wait_s - time.monotonic()
            if len(self._waiting) < self.max_batch_size and left_s > 0:
                await asyncio.sleep(left_s)
            batch: list[tuple[Asked, asyncio.Future[Outcome]]] = []
            while self._waiting and len(batch) < self.max_batch_size:
                asked, _, future = self._waiting.popleft()
                # Whoever asked may have gone.
                if not future.done():
                    batch.append((asked, future))
            if batch:
                await self._read_one(batch)

    async def _read_one(self, batch: list[tuple[Asked, asyncio.Future[Outcome]]]) -> None:
        self.busy_since = time.monotonic()
        try:
            outcomes = await asyncio.to_thread(self._read, [asked for asked, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)
        finally:
            self.busy_since = None
