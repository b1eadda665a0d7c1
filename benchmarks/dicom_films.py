"""DICOM films of a detector's size for benchmarks: phantoms enlarged, with grain, 12 and 16 bits, windowed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from ssacl.phantom import generate_study

SIZES_PX = ((1024, 1024), (1760, 1440), (2048, 2048))
"""Rows, columns; films take them in turn."""
_NUM_PHANTOMS = 12


def write_films(folder: Path, num_films: int) -> list[Path]:
    """`folder/PATIENT/STUDY/film.dcm` and `report.txt`; films that are there are kept."""
    phantoms = [generate_study(7, number, 256) for number in range(_NUM_PHANTOMS)]
    paths = []
    for number in range(num_films):
        path = folder / f"p{number // 2:04d}" / f"s{number:04d}" / "film.dcm"
        paths.append(path)
        if not path.exists():
            phantom = phantoms[number % len(phantoms)]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name("report.txt").write_text(phantom.report)
            _film(phantom.image, number).save_as(path, enforce_file_format=True)
    return paths


def _film(image: np.ndarray, number: int) -> FileDataset:
    rows, columns = SIZES_PX[number % len(SIZES_PX)]
    bits = (12, 16)[number // len(SIZES_PX) % 2]
    large = np.asarray(Image.fromarray(image.astype(np.float32)).resize((columns, rows), Image.Resampling.BICUBIC))
    grain = np.random.default_rng(number).normal(0, 2, large.shape).astype(np.float32)
    top = (1 << bits) - 1
    # The values in use are a part of the range, as a detector leaves them.
    pixels = np.clip((large + grain) / 255 * 0.7 * top + 0.1 * top, 0, top).astype(np.uint16)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[f"film {number}"])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.PatientID, ds.PatientName, ds.ViewPosition = "DX", f"made-up {number // 2}", f"Made^Up {number // 2}", "PA"
    ds.PhotometricInterpretation, ds.SamplesPerPixel, ds.PixelRepresentation = "MONOCHROME2", 1, 0
    ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = rows, columns, 16, bits, bits - 1
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    ds.WindowCenter, ds.WindowWidth = round(0.45 * top), round(0.7 * top)
    ds.PixelData = pixels.tobytes()
    return ds
