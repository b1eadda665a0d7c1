"""One piece of work in a thread, whose error is raised where its result is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs `work` at once. The thread does not keep the process from ending."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ssacl-checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def result(self, limit_s: float | None = None) -> None:
        """Wait for the end; raises what the work raised.

        Raises
        ------
        TimeoutError
            It has not ended within `limit_s`.
        """
        self._thread.join(limit_s)
        if not self.done:
            raise TimeoutError(f"not done after {limit_s:g} s, given up")
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
