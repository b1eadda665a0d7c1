"""What the train workers tell the driver of a run: an actor to pin records to, and a thread that shows them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.train_gauges import TrainGauges
from ssacl import errors
from ssacl.errors import SSACLError
from ssacl.training.reporter import LiveLine, Record

logger = logging.getLogger(__name__)

POLL_S = 0.5
SILENCE_S = 12.0
"""The driver says something at least this often."""


class Board:
    """Where workers pin up their records and the driver reads them; an actor."""

    def __init__(self, run: str = "") -> None:
        self._gauges = TrainGauges(run)
        self._records: list[dict[str, Any]] = []
        self._failure: tuple[str, str] | None = None

    def post(self, record: dict[str, Any]) -> None:
        self._records.append(record)
        self._gauges.show(record, time.time())

    def take(self) -> list[dict[str, Any]]:
        records, self._records = self._records, []
        return records

    def fail(self, kind: str, text: str) -> None:
        self._failure = self._failure or (kind, text)

    def failure(self) -> tuple[str, str] | None:
        return self._failure


def new_board(run: str) -> Any:
    """The `Board` of a run, on this node, which lives as long as its handle: other nodes may be lost."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Board).options(scheduling_strategy=here).remote(run)


class RayReporter:
    """A train worker's `Reporter`: tells the board."""

    def __init__(self, board: Any, world_rank: int) -> None:
        self._board, self._world_rank = board, world_rank

    def progress(self, record: Record) -> None:
        # Whichever rank hangs, and rank 0 may be the one: each says so.
        if self._world_rank == 0 or record["event"] == "hang":
            self._board.post.remote(dict(record))

    def milestone(self, record: Record) -> None:
        self.progress(record)
        # A barrier: the loop makes this call on every rank, equally often.
        ray.train.report({"event": record["event"], "stage": record.get("stage", ""), **record.get("losses", {})})


@contextlib.contextmanager
def live_line(board: Any, progress: bool) -> Iterator[None]:
    """Show the board's records on this process' stderr while the block runs."""
    if not progress:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(board, done), name="live-line", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10 * POLL_S)


def _show(board: Any, done: threading.Event) -> None:
    started = spoke = time.monotonic()
    logger.info("starting %s", "the train workers")
    with contextlib.closing(LiveLine()) as line:
        last = False
        while not last:
            last = done.wait(POLL_S)
            try:
                records = ray.get(board.take.remote(), timeout=5)
            except (ray.exceptions.RayError, TimeoutError):
                records = []
            for record in records:
                spoke = time.monotonic()
                line.show(record)
            if time.monotonic() - spoke > SILENCE_S:
                spoke = time.monotonic()
                logger.info("training: no news from the train workers for a while (%.0f s since the start)", spoke - started)


def raise_named(board: Any) -> None:
    """Raise the named error that a worker pinned up, if there is one."""
    try:
        failure = ray.get(board.failure.remote(), timeout=10)
    except (ray.exceptions.RayError, TimeoutError):
        return
    if failure is not None:
        kind = getattr(errors, failure[0], SSACLError)
        raise kind(failure[1])
