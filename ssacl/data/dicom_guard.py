"""Looks at a DICOM file before a library does: how much it will become, so that a small file cannot fill the memory or hold a core."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

DEFLATED = "1.2.840.10008.1.2.1.99"
MAX_INFLATED_BYTES = 250 << 20
"""Of a deflated data set: the largest picture that is read, and its header."""
MAX_SCANS = 100
"""Of a progressive JPEG. Encoders write about ten; each costs a pass over the picture."""
_LONG_VRS = {b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UR", b"UT", b"UN", b"SV", b"UV"}
_BLOCK = 1 << 20


def is_dicom(content: bytes) -> bool:
    """Whether the first bytes are those of a DICOM file, with a preamble or without."""
    return content[128:132] == b"DICM" or content[:2] in {b"\x08\x00", b"\x02\x00"}


def file_meta(content: bytes) -> tuple[str, int]:
    """TransferSyntaxUID of the file meta information, "" without one, and where the data set begins (PS3.10 section 7.1)."""
    place = 132 if content[128:132] == b"DICM" else 0
    syntax = ""
    while content[place : place + 2] == b"\x02\x00" and place + 8 <= len(content):
        vr, element = content[place + 4 : place + 6], content[place + 2 : place + 4]
        if vr in _LONG_VRS:
            length, start = int.from_bytes(content[place + 8 : place + 12], "little"), place + 12
        else:
            length, start = int.from_bytes(content[place + 6 : place + 8], "little"), place + 8
        if element == b"\x10\x00":
            syntax = content[start : start + length].decode("ascii", errors="replace").strip("\0 ")
        place = start + length
    return syntax, place


def inflates_beyond(content: bytes, limit: int) -> bool:
    """Whether the deflated data set of a file is longer than `limit` bytes; at most a block of it is held at a time."""
    syntax, start = file_meta(content)
    if syntax != DEFLATED:
        # An unreadable meta group that still names the syntax: pydicom might find its way, and nobody knows into what.
        return syntax == "" and DEFLATED.encode() in content[:4096]
    inflater, total, waiting = zlib.decompressobj(-zlib.MAX_WBITS), 0, content[start:]
    try:
        while waiting and not inflater.eof and total <= limit:
            total += len(inflater.decompress(waiting, _BLOCK))
            waiting = inflater.unconsumed_tail
    except zlib.error:
        pass  # Who reads the file finds the damage at the same place, and names it.
    return total > limit


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG, JPEG-LS or JPEG 2000 code stream itself declares; None where it declares none.

    A decoder makes room for what the stream says, whatever the DICOM header says.
    """
    if frame[:2] == b"\xff\xd8":
        for marker, body in _jpeg_segments(frame):
            # SOF0-15 without DHT, JPG, DAC; SOF55 is JPEG-LS.
            if (0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}) or marker == 0xF7:
                return struct.unpack(">HH", body[1:5]) if len(body) >= 5 else None
        return None
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)
    if start >= 0 and len(frame) >= start + 24:
        width, height, left, top = struct.unpack(">IIII", frame[start + 8 : start + 24])
        return height - top, width - left
    return None


def has_too_many_scans(content: bytes) -> bool:
    """Whether a JPEG stream has more passes than any encoder writes."""
    return content.count(b"\xff\xda") > MAX_SCANS


def _jpeg_segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    place = 2
    while place + 4 <= len(frame) and frame[place] == 0xFF:
        marker, length = frame[place + 1], int.from_bytes(frame[place + 2 : place + 4], "big")
        yield marker, frame[place + 4 : place + 2 + length]
        place += 2 + max(length, 2)
