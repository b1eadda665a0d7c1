"""How work on an instance can end, other than well."""

from __future__ import annotations


class AwayError(Exception):
    """The other side cannot be reached or is busy: nobody's fault, tried again for as long as it takes."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.retry_after_s = reason, retry_after_s


class FailedError(Exception):
    """It went wrong, perhaps because of this instance: tried again a bounded number of times."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RefusedError(Exception):
    """It will never go well with this instance."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SpoolFullError(Exception):
    """The spool or the disk has no room."""
