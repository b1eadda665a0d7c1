"""Damaged, odd and hostile files: each gives a picture or a named reason, in bounded time and memory."""

from __future__ import annotations

import functools
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import dicom, film
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from ssacl.data.refusals import REASONS

MAX_S = 10.0
"""Of processor time, for one file. A sound one takes some 0.01 s."""
MAX_MEMORY = 1 << 30
"""Peak of a process that reads all of them, 1 GiB; importing what reads takes a fifth of it."""

# Reads every file of a folder and writes a line for each; a hang is ended from inside, and names its file by being the last.
READER = """
import faulthandler, json, resource, sys, time
from pathlib import Path
from ssacl.data.deidentify import identifiers_in, patient_id_in
from ssacl.data.dicom import encode_picture, read_picture
from ssacl.data.refusals import RefusedImageError
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (4 * limit, 4 * limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    faulthandler.dump_traceback_later(60, exit=True)
    content, started = path.read_bytes(), time.process_time()
    try:
        picture = read_picture(content, path.name, find_text=True)
        encode_picture(picture, 64)
        outcome = "picture"
    except RefusedImageError as error:
        outcome = error.reason
    patient_id_in(content[:65536]), identifiers_in(content)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([path.name, outcome, time.process_time() - started, used]), flush=True)
faulthandler.cancel_dump_traceback_later()
"""


def own_files() -> dict[str, bytes]:
    """Sound files of each kind, and copies that are cut off or have bytes changed."""
    jpeg = io.BytesIO()
    Image.fromarray(film()).save(jpeg, "JPEG")
    sound = {
        "plain": dicom(film()),
        "deep": dicom(film().astype(np.uint16) << 4, 12, WindowCenter=2048, WindowWidth=4096),
        "rle": dicom(film(), syntax=RLELossless),
        "jpegls": dicom(film(), syntax=JPEGLSLossless),
        "j2k": dicom(film(), syntax=JPEG2000Lossless),
        "deflated": dicom(film(), syntax=DeflatedExplicitVRLittleEndian),
        "jpeg": encapsulated(jpeg.getvalue(), JPEGBaseline8Bit),
    }
    files = {f"sound_{name}.dcm": content for name, content in sound.items()}
    random = np.random.default_rng(7)
    for name, content in sound.items():
        for share in (0.1, 0.5, 0.95):
            files[f"cut_{name}_{share}.dcm"] = content[: int(len(content) * share)]
        for number, (start, end) in enumerate([(132, 900), (132, 900), (900, len(content)), (132, len(content))]):
            damaged = np.frombuffer(content, np.uint8).copy()
            where = random.integers(min(start, len(content) - 1), min(end, len(content)), 12)
            damaged[where] ^= 1 << random.integers(0, 8, 12).astype(np.uint8)
            files[f"flipped_{name}_{number}.dcm"] = damaged.tobytes()
    return files


def encapsulated(frame: bytes, syntax: str, **attributes: int) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(dicom(film())))
    ds.PixelData, ds.file_meta.TransferSyntaxUID = encapsulate([frame]), syntax
    ds["PixelData"].is_undefined_length = True
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    buffer = io.BytesIO()
    ds.save_as(buffer)
    return buffer.getvalue()


def deflated(size: int, with_length: bool = True) -> bytes:
    """A deflated data set of a film and `size` zeros after it; without the meta group's length it must still be seen through."""
    whole = dicom(film(), syntax=DeflatedExplicitVRLittleEndian)
    length = int.from_bytes(whole[140:144], "little")
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = b"".join(packer.compress(bytes(1 << 22)) for _ in range(size >> 22)) + packer.flush()
    return (whole[:144] if with_length else whole[:132]) + whole[144 : 144 + length] + body


@functools.cache
def hostile_files() -> dict[str, tuple[bytes, str]]:
    """File -> content and the reason that it must be refused for: small files that want much."""
    jpeg = io.BytesIO()
    Image.fromarray(film()).save(jpeg, "JPEG", progressive=True)
    frame = jpeg.getvalue()
    scan = frame.index(b"\xff\xda")
    j2k = io.BytesIO()
    Image.fromarray(film()).save(j2k, "JPEG2000", no_jp2=True)
    siz = j2k.getvalue().index(b"\xff\x51") + 6
    huge_j2k = bytearray(j2k.getvalue())
    huge_j2k[siz : siz + 8] = struct.pack(">II", 60000, 60000)
    runs = struct.pack("<16I", 1, 64, *([0] * 14)) + b"\x81\x00" * (4 << 20)
    return {
        "header_30000.dcm": (dicom(None, Rows=30000, Columns=30000, BitsAllocated=16, BitsStored=16, HighBit=15), "too_large"),
        "header_65535_short.dcm": (dicom(film(), Rows=65535, Columns=65535), "too_large"),
        "deflate_bomb.dcm": (deflated(320 << 20), "too_large"),
        "deflate_bomb_no_length.dcm": (deflated(320 << 20, with_length=False), "too_large"),
        "jpeg_of_60000.dcm": (encapsulated(_sized(frame, 60000), JPEGBaseline8Bit), "unreadable"),
        "j2k_of_60000.dcm": (encapsulated(bytes(huge_j2k), JPEG2000Lossless), "unreadable"),
        "scans_without_end.dcm": (encapsulated(frame[:scan] + frame[scan:-2] * 500, JPEGBaseline8Bit), "unreadable"),
        "scans_without_end.jpg": (frame[:scan] + frame[scan:-2] * 500, "unreadable"),
        "run_length_bomb.dcm": (encapsulated(runs, RLELossless), "unreadable"),
        "bits_64.dcm": (dicom(film(), BitsAllocated=64, BitsStored=64, HighBit=63, Rows=32, Columns=64), "unreadable"),
    }


def _sized(frame: bytes, side: int) -> bytes:
    place = frame.index(b"\xff\xc2") + 5
    return frame[:place] + struct.pack(">HH", side, side) + frame[place + 4 :]


def foreign_files() -> dict[str, bytes]:
    """pydicom's own test files, as many as come with its wheel: odd headers, all syntaxes, other modalities, directories."""
    root = Path(pydicom.__file__).parent / "data" / "test_files"
    return {f"pydicom_{path.name}": path.read_bytes() for path in sorted(root.glob("*.dcm"))} | {
        f"pydicom_{path.name}": path.read_bytes() for path in sorted((root / "dicomdirtests").glob("DICOMDIR*"))
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, int]]:
    folder = tmp_path_factory.mktemp("damaged")
    files = own_files() | {name: content for name, (content, _) in hostile_files().items()} | foreign_files()
    files |= {"empty.dcm": b"", "text.dcm": b"no film", "preamble.dcm": bytes(128) + b"DICM"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    arguments = [sys.executable, "-c", READER, str(folder), str(MAX_MEMORY)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280, cwd=Path(__file__).parents[1], env=environment)
    read = {name: (outcome, seconds, used) for name, outcome, seconds, used in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"stopped after {len(read)} of {len(files)} files: {done.stderr[-1500:]}"
    assert set(read) == set(files)
    return read


def test_each_file_gives_a_picture_or_a_named_reason(outcomes: dict[str, tuple[str, float, int]]) -> None:
    counts = Counter(outcome for outcome, _, _ in outcomes.values())
    print(len(outcomes), dict(counts))
    assert len(outcomes) >= 120
    assert set(counts) <= set(REASONS) | {"picture"}
    assert all(outcomes[name][0] == "picture" for name in outcomes if name.startswith("sound_"))
    # All kinds of damage were met, not one kind many times.
    assert len(counts) >= 8
    assert counts["picture"] >= 15


def test_none_takes_long_or_much_memory(outcomes: dict[str, tuple[str, float, int]]) -> None:
    slowest = max(outcomes, key=lambda name: outcomes[name][1])
    peak = max(used for _, _, used in outcomes.values())
    print(slowest, round(outcomes[slowest][1], 2), "s;", peak >> 20, "MiB")
    assert outcomes[slowest][1] < MAX_S
    assert peak < MAX_MEMORY


@pytest.mark.parametrize("name", hostile_files())
def test_small_files_that_want_much_are_refused(name: str, outcomes: dict[str, tuple[str, float, int]]) -> None:
    assert outcomes[name][0] == hostile_files()[name][1]
