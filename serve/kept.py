"""Answers that are fetched later: `Prefer: respond-async`. What was accepted is never lost silently, and nothing stays beyond its time.

In storage lie ID.json (the state) and ID.answer. An ID begins with the second in which it expires: what is over is known by its name.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from serve.problems import Problem, ProblemError, problem_of
from serve.service_settings import KeptSettings
from ssacl.data.storage import MissingObjectError, Storage, open_storage
from ssacl.errors import StorageError

logger = logging.getLogger(__name__)
_ID = re.compile(r"([0-9a-f]{9})-[0-9a-f]{32}")
_SWEEP_S = 30.0
_T = TypeVar("_T")
_GRACE_S = 10.0
"""For the last write after the time limit."""


class JobState(BaseModel):
    """What is known of an accepted request."""

    id: str
    client: str
    """Hash of the client's name: only this client may see it."""
    status: Literal["running", "done", "failed"] = "running"
    deadline_at: float
    """Seconds since the epoch. Whoever was to answer is gone when it has passed."""
    headers: dict[str, str] = {}
    problem: Problem | None = None


class KeptReports:
    """Accepted requests of all ingress replicas that share the storage.

    Parameters
    ----------
    settings
        With `url` set.
    time_limit_s
        Longest time from acceptance to answer.
    on_pending
        Told how many requests of this replica are being answered.
    """

    def __init__(self, settings: KeptSettings, time_limit_s: float, on_pending: Callable[[int], None]) -> None:
        self._settings, self._time_limit_s, self._on_pending = settings, time_limit_s, on_pending
        self._storage: Storage = open_storage(settings.url or "")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._unwanted: set[str] = set()
        # Answers are deleted in time on an endpoint that nobody calls, too.
        threading.Thread(target=self._sweep_forever, name="ssacl-kept", daemon=True).start()

    async def accept(self, client: str, answer: Callable[[], Awaitable[Response]], request_id: str) -> str:
        """Have a request answered in the background; its id. It is in storage when this returns.

        Raises
        ------
        ProblemError
            503: too many are pending, or storage is away.
        """
        if len(self._tasks) >= self._settings.max_pending:
            raise ProblemError(503, "overloaded", "The endpoint is busy", "Too many reports are pending. Try again later.", 5)
        job = f"{int(time.time() + self._settings.retention_s):09x}-{secrets.token_hex(16)}"
        state = JobState(id=job, client=_hash(client), deadline_at=time.time() + self._time_limit_s + _GRACE_S)
        await self._guarded(self._write, state)
        self._tasks[job] = asyncio.create_task(self._answer(state, answer, request_id))
        self._tasks[job].add_done_callback(lambda _: self._ended(job))
        self._on_pending(len(self._tasks))
        return job

    async def find(self, job: str, client: str) -> tuple[JobState, bytes]:
        """State and answer (empty unless it is done).

        Raises
        ------
        ProblemError
            404: no such request of this client, or its time is over. 503: storage is away.
        """
        state = await self._guarded(self._read, job)
        if state is None or not secrets.compare_digest(state.client, _hash(client)):
            raise ProblemError(404, "no-report", "There is no such report", "It was never accepted, is another client's, or has expired.")
        if state.status == "running" and time.time() > state.deadline_at:
            lost = ProblemError(
                503, "interrupted", "The report was interrupted", "The endpoint was stopped meanwhile. Send the film again."
            )
            state = state.model_copy(update={"status": "failed", "problem": Problem.model_validate(lost.body(job))})
            await self._guarded(self._write, state)
        if state.status != "done":
            return state, b""
        try:
            return state, await asyncio.to_thread(self._storage.read, f"{job}.answer")
        except StorageError as error:
            raise _away() from error

    async def delete(self, job: str, client: str) -> None:
        """Delete a request and its answer; an answer that is still being made is thrown away. Raises as `find`."""
        await self.find(job, client)
        if job in self._tasks:
            self._unwanted.add(job)
        await self._guarded(self._remove, job)

    async def _answer(self, state: JobState, answer: Callable[[], Awaitable[Response]], request_id: str) -> None:
        try:
            response = await asyncio.wait_for(answer(), self._time_limit_s)
            headers = {name: response.headers[name] for name in ("content-type", "x-image-index") if name in response.headers}
            await asyncio.to_thread(self._storage.write, f"{state.id}.answer", bytes(response.body))
            state = state.model_copy(update={"status": "done", "headers": headers})
        # Whatever ends it is told to the client when it asks.
        except Exception as error:
            logger.error("request %s failed after it was accepted: %s", request_id, type(error).__name__)
            problem = Problem.model_validate(problem_of(error).body(request_id))
            state = state.model_copy(update={"status": "failed", "problem": problem})
        try:
            await asyncio.to_thread(self._write, state)
            if state.id in self._unwanted:
                await asyncio.to_thread(self._remove, state.id)
        except StorageError as error:
            # It stays "running" and is reported as interrupted after its deadline.
            logger.error("request %s: its end cannot be written (%s)", request_id, type(error).__name__)

    def _ended(self, job: str) -> None:
        self._tasks.pop(job, None)
        self._unwanted.discard(job)
        self._on_pending(len(self._tasks))

    async def _guarded(self, call: Callable[..., _T], *arguments: object) -> _T:
        try:
            return await asyncio.to_thread(call, *arguments)
        except StorageError as error:
            raise _away() from error

    def _write(self, state: JobState) -> None:
        self._storage.write(f"{state.id}.json", state.model_dump_json().encode())

    def _read(self, job: str) -> JobState | None:
        match = _ID.fullmatch(job)
        if match is None or int(match[1], 16) <= time.time():
            return None
        try:
            return JobState.model_validate_json(self._storage.read(f"{job}.json"))
        except (MissingObjectError, ValidationError):
            return None

    def _remove(self, job: str) -> None:
        # The state first: without it the answer cannot be had.
        self._storage.delete(f"{job}.json")
        self._storage.delete(f"{job}.answer")

    def sweep(self) -> None:
        """Delete what is over."""
        for item in self._storage.list():
            match = _ID.fullmatch(item.key.rpartition(".")[0])
            if match is not None and int(match[1], 16) <= time.time():
                self._storage.delete(item.key)

    def _sweep_forever(self) -> None:
        while True:
            try:
                self.sweep()
            except StorageError as error:
                logger.warning("expired reports cannot be deleted now: %s", type(error).__name__)
            time.sleep(_SWEEP_S)


def _hash(client: str) -> str:
    return hashlib.sha256(client.encode()).hexdigest()


def _away() -> ProblemError:
    return ProblemError(503, "storage", "Kept reports cannot be reached", "The storage is away. Try again later.", 10)
