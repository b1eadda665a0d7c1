"""What a shard's picture keeps of a film: contrast of small discs and thin lines after the way from DICOM to an encoded picture.

    python -m benchmarks.picture_detail [--quick] [--save]

The film is made: 43 cm on 3072 px (0.14 mm), 12 bits, a flat soft-tissue grey with discs (nodules) and lines (septal lines, catheters) that
are 10 % of the range brighter. Contrast is read at their middle, as a share of what they have on the film; one is all of it.
"""

from __future__ import annotations

import argparse
import io
import sys

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.data.dicom import encode_picture, read_picture

FILM_MM = 430.0
GROUND, CONTRAST = 2000, 410
DISCS_MM = (1.0, 2.0, 3.0, 5.0, 10.0)
LINES_MM = (0.3, 0.5, 1.0, 2.0)
SIDES_PX = (512, 1024, 2048)


def measure(options: argparse.Namespace) -> Measurement:
    """Contrast kept per picture size and structure, and what JPEG and 8 bits cost."""
    side = 1536 if options.quick else 3072
    kept = {
        f"{longest}_px": {
            f"{kind}_{size_mm:g}_mm": round(_kept(kind, size_mm, side, min(longest, side)), 2)
            for kind, sizes in (("disc", DISCS_MM), ("line", LINES_MM))
            for size_mm in sizes
        }
        for longest in SIDES_PX
    }
    figures = {"contrast_kept": kept, "jpeg_error_greys": round(_jpeg_error(side), 2), "stored_levels_to_a_grey": 4096 / 256}
    goals = {"contrast_kept.512_px.disc_5_mm": Goal(min=0.9), "jpeg_error_greys": Goal(max=1.0)}
    return Measurement(figures, goals, {"film_px": side, "film_mm": FILM_MM, "bits_stored": 12})


def _kept(kind: str, size_mm: float, side: int, longest: int) -> float:
    """Mean over places on and between pixels of the target grid, so that no lucky fit counts."""
    mm = FILM_MM / side
    offsets = [(side / 2 + shift * side / longest) * mm for shift in (0.0, 0.25, 0.5, 0.75)]
    return float(np.mean([_contrast(kind, size_mm, side, longest, offset) for offset in offsets]))


def _contrast(kind: str, size_mm: float, side: int, longest: int, centre_mm: float) -> float:
    mm = FILM_MM / side
    place = (np.arange(side) + 0.5) * mm
    x, y = np.meshgrid(place, place, sparse=True)
    distance = np.hypot(x - centre_mm, y - centre_mm) if kind == "disc" else np.abs(x - centre_mm) + 0 * y
    # What of a pixel the structure covers.
    covered = np.minimum(distance + mm / 2, size_mm / 2) - np.maximum(distance - mm / 2, -size_mm / 2)
    film = GROUND + CONTRAST * np.clip(covered / mm, 0, 1)
    content, _ = encode_picture(read_picture(_dicom(film.astype(np.uint16)), correct_polarity=False), longest)
    with Image.open(io.BytesIO(content)) as image:
        shown = np.asarray(image, dtype=np.float64)
    at = int(centre_mm / FILM_MM * longest)
    return float((shown[at, at] - np.median(shown)) / (CONTRAST / 4095 * 255))


def _jpeg_error(side: int) -> float:
    """Against the same picture without loss, of a film with noise such as a detector has."""
    random = np.random.default_rng(0)
    waves = 600 * np.sin(np.linspace(0, 20, side))[:, None] * np.cos(np.linspace(0, 16, side))[None]
    film = np.clip(GROUND + waves + random.normal(0, 30, (side, side)), 0, 4095).astype(np.uint16)
    picture = read_picture(_dicom(film), correct_polarity=False)
    with Image.open(io.BytesIO(encode_picture(picture, 512)[0])) as image:
        lossy = np.asarray(image, dtype=np.float64)
    exact = Image.fromarray(picture.pixels).resize(lossy.shape[::-1], Image.Resampling.LANCZOS, reducing_gap=3.0)
    return float(np.abs(lossy - np.asarray(exact)).mean())


def _dicom(stored: NDArray[np.uint16]) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, "DX"
    ds.PhotometricInterpretation, ds.SamplesPerPixel, ds.PixelRepresentation = "MONOCHROME2", 1, 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.Rows, ds.Columns = stored.shape
    ds.WindowCenter, ds.WindowWidth, ds.PixelData = 2048, 4096, stored.tobytes()
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(run_benchmark("picture_detail", measure, description=__doc__))
