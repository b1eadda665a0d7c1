"""A `multipart/related` body (RFC 2387) as it comes in: one part after the other, never more than one in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


class BrokenBodyError(Exception):
    """It is no multipart body, or ends before its end."""


class TooLargeError(Exception):
    """A part is longer than allowed."""


def media_type(header: str) -> tuple[str, dict[str, str]]:
    """A media type in small letters, and its parameters."""
    kind, parameters = parse_options_header(header)
    named = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in parameters.items()}
    return kind.decode("latin-1").strip().lower(), named


async def parts_of(chunks: AsyncIterable[bytes], boundary: str, max_part_bytes: int) -> AsyncGenerator[bytes, None]:
    """The contents of the parts; what their headers say is left aside.

    Raises
    ------
    BrokenBodyError, TooLargeError
        What came before was given nevertheless.
    """
    gatherer = _Gatherer(max_part_bytes)
    try:
        parser = MultipartParser(boundary.encode("latin-1", "replace"), gatherer.callbacks())
        async for chunk in chunks:
            parser.write(chunk)
            while gatherer.whole:
                yield gatherer.whole.pop(0)
    except FormParserError as error:
        raise BrokenBodyError from error
    if not gatherer.has_ended:
        raise BrokenBodyError


class _Gatherer:
    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._part = max_bytes, bytearray()
        self.whole: list[bytes] = []
        self.has_ended = False

    def callbacks(self) -> MultipartCallbacks:
        return {"on_part_begin": self._begin, "on_part_data": self._gather, "on_part_end": self._end, "on_end": self._finish}

    def _begin(self) -> None:
        self._part = bytearray()

    def _gather(self, data: bytes, start: int, end: int) -> None:
        if len(self._part) + end - start > self._max_bytes:
            raise TooLargeError
        self._part += data[start:end]

    def _end(self) -> None:
        self.whole.append(bytes(self._part))
        self._part = bytearray()

    def _finish(self) -> None:
        self.has_ended = True
