"""A step that never ends: collectives wait for a rank that hangs, some of them for ever. The watchdog ends the process instead.

It runs in a thread of its own, since the thread that hangs can no longer raise anything. The process ends with `EXIT_HUNG`, so that Ray
Train or torchrun starts the group again, which goes on at the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

EXIT_HUNG = 75
"""Exit status of a process that its watchdog ended (EX_TEMPFAIL of sysexits.h: try again)."""
_TELL_S = 2.0
"""Longest time that telling about it may take."""


class Watchdog:
    """`watch("step 12")` before each piece of work that may hang, `rest()` when there is none.

    Parameters
    ----------
    limit_s : longest time between two calls; 0 watches nothing.
    tell : hears the error's text before the process ends.
    """

    def __init__(self, limit_s: float, tell: Callable[[str], None]) -> None:
        self._limit_s, self._tell = limit_s, tell
        self._what, self._deadline = "", float("inf")
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        if limit_s > 0:
            self._thread.start()

    def watch(self, what: str) -> None:
        """`what` begins now and has `limit_s`."""
        if self._limit_s > 0:
            with self._lock:
                self._what, self._deadline = what, time.monotonic() + self._limit_s

    def rest(self) -> None:
        """Nothing is watched until the next `watch`."""
        with self._lock:
            self._deadline = float("inf")

    def close(self) -> None:
        """Watch nothing any more."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(min(1.0, self._limit_s / 10)):
            with self._lock:
                what, late = self._what, time.monotonic() > self._deadline
            if late:
                self._end(what)

    def _end(self, what: str) -> None:
        text = (
            f"TrainingError: {what} did not end within run.hang_limit_s {self._limit_s:g}: this rank hangs, or another that it waits for. "
            "The process ends; started again, the run goes on at its last checkpoint. If the work is only slow, raise run.hang_limit_s."
        )
        logger.critical("%s", text)
        # Not here: what is told may hang as well.
        telling = threading.Thread(target=self._tell, args=(text,), daemon=True)
        telling.start()
        telling.join(_TELL_S)
        faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        os._exit(EXIT_HUNG)
