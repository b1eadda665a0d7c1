"""Progress of long work: a bar on a terminal, a log line every few seconds otherwise. Always on stderr."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class ProgressBar:
    """`with ProgressBar("ingest", total=100, unit="studies") as bar: bar.advance(1, note="2 rejects")`."""

    def __init__(self, name: str, total: int | None, unit: str = "items", log_every_s: float = 10.0) -> None:
        self._name, self._total, self._unit, self._log_every_s = name, total, unit, log_every_s
        self._done, self._skipped, self._note = 0, 0, ""
        self._started = self._logged = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
            columns = (name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, note="")
        return self

    def set_total(self, total: int) -> None:
        """`total` items are to be done, where that was not known at the start."""
        self._total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def start_at(self, count: int) -> None:
        """`count` items were done before: they are shown, but neither rate nor time left is reckoned with them."""
        self._done = self._skipped = count
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, total=self._total, completed=count)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count `count` more items done; `note` (losses, rejects, ...) is shown behind the rate."""
        self._done += count
        self._note = self._note if note is None else note
        now = time.monotonic()
        per_s = (self._done - self._skipped) / max(now - self._started, 1e-6)
        rate = f"{per_s:.1f} {self._unit}/s {self._note}".rstrip()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, note=rate)
        elif now - self._logged >= self._log_every_s:
            self._logged = now
            total = "" if self._total is None else f"/{self._total}"
            left = f", {(self._total - self._done) / per_s:.0f} s left" if self._total and per_s else ""
            logger.info("%s: %d%s, %s%s", self._name, self._done, total, rate, left)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elapsed = time.monotonic() - self._started
        logger.info("%s: %d %s in %.1f s %s", self._name, self._done, self._unit, elapsed, self._note)
