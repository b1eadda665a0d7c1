"""`--format dicom-dir`: a folder tree of DICOM files, one study per folder, its report in a text file beside them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator

from ssacl.data.deidentify import patient_id_in
from ssacl.data.records import Study
from ssacl.data.sources.labels import split_name
from ssacl.data.sources.options import SourceOptions
from ssacl.data.sources.place import SourcePlace
from ssacl.errors import DataError

_DICOM_NAME = re.compile(r"\.(?:dcm|dicom|dic|ima)$|^(?!DICOMDIR$|LICENSE$|README$|VERSION$|\.)[^.]+$|\.\d+$", re.IGNORECASE)
"""Archives often write DICOM files without a suffix, or named by UID."""
_HEAD_BYTES = (1 << 16, 1 << 22)


def find_dicom_studies(place: SourcePlace, options: SourceOptions) -> Iterator[Study]:
    """The studies below a folder, by folder name. .../PATIENT/STUDY/IMAGE.dcm, or one folder per patient; a first folder train, val or
    test is the split."""
    if place.key:
        raise DataError(f"{place.url} is a file; --format dicom-dir reads a folder of DICOM files (--format csv reads a CSV).")
    files = place.files()
    folders: dict[str, list[str]] = {}
    for key in files:
        folders.setdefault(posixpath.dirname(key), []).append(key)
    studies = {folder: keys for folder, keys in sorted(folders.items()) if any(_is_dicom(key) for key in keys)}
    if not studies:
        there = sorted({posixpath.splitext(key)[1] or "no suffix" for key in list(files)[:1000]})
        raise DataError(f"No .dcm file below {place.url}. It holds: {', '.join(there[:10]) or 'nothing'}. Check the path or the format.")
    return (_study(place, files, folder, keys) for folder, keys in studies.items())


def _is_dicom(key: str) -> bool:
    return _DICOM_NAME.search(posixpath.basename(key)) is not None


def _study(place: SourcePlace, files: dict[str, int], folder: str, keys: list[str]) -> Study:
    images = [key for key in keys if _is_dicom(key)]
    texts = [key for key in keys if key.lower().endswith(".txt")]
    texts = [key for key in texts if posixpath.basename(key).lower() == "report.txt"] or texts
    parts = folder.split("/") if folder else []
    given = split_name(parts[0]) if parts else ""
    # Without a header the layout speaks: .../PATIENT/STUDY/IMAGE.dcm, or one folder per patient.
    by_layout = parts[-2] if len(parts) >= 2 + bool(given) else folder or "root"
    return Study(
        study_id=folder or ".",
        patient_id=_patient_id(place, images[0], files[images[0]]) or by_layout,
        images=tuple(place.image(key, files[key]) for key in images),
        split=given,
        report="\n".join(place.texts(texts)),
        source="dicom-dir",
    )


def _patient_id(place: SourcePlace, key: str, size: int) -> str:
    for num_bytes in _HEAD_BYTES:
        known = patient_id_in(place.head(key, min(size, num_bytes)))
        if known or size <= num_bytes:
            return known
    return ""
