"""Uploads that are wrong on purpose, for tests: name -> content type and body."""

from __future__ import annotations

import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from dicom_files import dicom, film
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless
from tiny_model import encoded_film

PLANTED = ("PLANTED^NAME", "PLANTED-ID", "DOE-JOHN-1955")
_DICOM, _PNG, _JPEG = "application/dicom", "image/png", "image/jpeg"
_PATHS = (
    "../../etc/passwd",
    "/etc/shadow",
    "C:\\boot.ini",
    "file:///etc/passwd",
    "http://127.0.0.1:1/x",
    "x\0y",
    "a" * 5000,
    "'; DROP",
    "${jndi:x}",
)


def hostile_uploads() -> Iterator[tuple[str, str, bytes]]:
    """Name, content type and body of each; more than 200, the same each time."""
    yield from _cut_and_flipped()
    yield from _headers_that_lie()
    yield from _other_files()
    yield from _multiparts()


def _cut_and_flipped() -> Iterator[tuple[str, str, bytes]]:
    sources = {_DICOM: dicom(film(), BodyPartExamined="CHEST"), _PNG: encoded_film("PNG"), _JPEG: encoded_film("JPEG")}
    chance = random.Random(8)
    for kind, content in sources.items():
        for length in (0, 1, 8, 100, 132, 200, 400, len(content) // 2):
            yield f"{kind} cut to {length}", kind, content[:length]
        for number in range(25):
            damaged = bytearray(content)
            for _ in range(1 + number):
                damaged[chance.randrange(min(len(damaged), 1200))] = chance.randrange(256)
            yield f"{kind} with {1 + number} bytes changed", kind, bytes(damaged)
        for number in range(5):
            yield f"{kind} noise {number}", kind, content[:4] + chance.randbytes(3000)


def _headers_that_lie() -> Iterator[tuple[str, str, bytes]]:
    pixels = film()
    changes: dict[str, dict[str, object]] = {
        "10,000 frames": {"NumberOfFrames": 10_000},
        "frames that are no number": {"NumberOfFrames": -5},
        "65,535 rows and columns": {"Rows": 65535, "Columns": 65535},
        "no rows": {"Rows": 0},
        "no pixels": {"PixelData": None},
        "a SR": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.33", "Modality": "SR", "PixelData": None, "Rows": None},
        "a PDF": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.104.1", "Modality": "DOC", "PixelData": None, "EncapsulatedDocument": b"%PDF"},
        "a CT": {"Modality": "CT"},
        "a lateral": {"ViewPosition": "LL"},
        "a knee": {"BodyPartExamined": "KNEE"},
        "a dog": {"PatientSpeciesDescription": "CANINE"},
        "colour": {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"},
        "an unknown photometric": {"PhotometricInterpretation": "XYZ"},
        "64 bits": {"BitsAllocated": 64, "BitsStored": 64},
        "no bits": {"BitsAllocated": 0},
        "a blank film": {"PixelData": bytes(pixels.size)},
        "short pixels": {"PixelData": pixels.tobytes()[:100]},
        "a huge comment": {"ImageComments": "DOE-JOHN-1955 " * 100_000},
    }
    for name, change in changes.items():
        yield f"DICOM: {name}", _DICOM, dicom(pixels, **change)
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", 22) + DeflatedExplicitVRLittleEndian.encode()
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = squeezer.compress(bytes(300 << 20)) + squeezer.flush()
    yield "DICOM: deflate bomb", _DICOM, bytes(128) + b"DICM" + meta + bomb
    for depth in (10, 1000, 20_000):
        nested = b"\x40\x00\x75\x02SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
        yield f"DICOM: {depth} sequences in each other", _DICOM, dicom(pixels)[:400] + nested
    yield "DICOM: an element of 4 GiB", _DICOM, dicom(pixels)[:400] + b"\xe0\x7f\x10\x00OB\0\0\xfe\xff\xff\xff"
    stream = bytearray(dicom(np.asarray(pixels), syntax=JPEG2000Lossless))
    place = stream.find(b"\xff\x4f\xff\x51")
    stream[place + 8 : place + 16] = struct.pack(">II", 60_000, 60_000)
    yield "DICOM: a code stream larger than its header", _DICOM, bytes(stream)
    png = encoded_film("PNG")
    for width, height in ((65_535, 65_535), (2**31 - 1, 1), (0, 0)):
        chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        yield f"PNG: says {width} x {height}", _PNG, png[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]
    text = b"tEXtDOE\0" + b"x" * 2_000_000
    yield "PNG: long text", _PNG, png[:33] + struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text)) + png[33:200]
    yield "JPEG: many scans", _JPEG, encoded_film("JPEG") + b"\xff\xda\x00\x08" * 5000


def _other_files() -> Iterator[tuple[str, str, bytes]]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("../../DOE-JOHN-1955.dcm", bytes(1 << 20))
    others = {
        "text": b"DOE-JOHN-1955 has a cough.",
        "zip": archive.getvalue(),
        "gzip": gzip.compress(bytes(1 << 20)),
        "PDF": b"%PDF-1.7\n" + bytes(500),
        "HTML": b"<script>alert(1)</script>",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "XML entities": b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
        "GIF": b"GIF89a" + bytes(200),
        "TIFF": b"II*\0" + bytes(200),
        "BMP": b"BM" + bytes(200),
        "ELF": b"\x7fELF" + bytes(200),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "zeros": bytes(100_000),
    }
    for name, content in others.items():
        for kind in (_DICOM, _PNG, "application/octet-stream", "text/plain", "application/json", ""):
            yield f"{name} as {kind or 'nothing'}", kind, content


def _multiparts() -> Iterator[tuple[str, str, bytes]]:
    kind, good = "multipart/form-data; boundary=b", encoded_film("PNG")
    for path in _PATHS:
        head = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{path}"\r\n\r\n'.encode()
        yield f"path name {path[:20]!r}", kind, head + b"no film\r\n--b--\r\n"
        field = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + path.encode() + b"\r\n--b--\r\n"
        yield f"path in a field {path[:20]!r}", kind, field
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + good[:50] + b"\r\n"
    yield "1,000 parts", kind, part * 1000 + b"--b--\r\n"
    yield "never ends", kind, part
    yield "a header of 1 MB", kind, b"--b\r\nX-A: " + b"a" * (1 << 20) + b"\r\n\r\nx\r\n--b--\r\n"
    yield "no boundary", "multipart/form-data", part
    yield "a boundary of 10,000", f"multipart/form-data; boundary={'b' * 10_000}", part
    yield "an unknown charset", f"{kind}; charset=nothing", part + b"--b--\r\n"
    yield "nested", kind, part.replace(b"\r\n\r\n", b"\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx--c--", 1) + b"--b--"
