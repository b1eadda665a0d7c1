"""Where studies come from: a CSV of pictures and reports, or a folder tree of DICOM files -> `Study` records, in a fixed order."""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ssacl.anatomy import FINDINGS, NO_FINDING, FindingStatus
from ssacl.data.deidentify import patient_id_of
from ssacl.data.records import SPLITS, Study, StudyImage
from ssacl.data.truth_guard import is_truth_folder, refuse_truth
from ssacl.errors import ConfigError, DataError, NotBuiltError

FORMATS = ("csv", "dicom-dir")
LATER_FORMATS = ("mimic-cxr", "mimic-cxr-jpg", "iu-xray", "release-csv", "dicomweb")
ROLES = ("image", "report", "patient", "study", "split", "view", "labels", "licence")

logger = logging.getLogger(__name__)

_SPLIT_NAMES = {name: name for name in SPLITS} | {
    "training": "train",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "testing": "test",
}
_DICOM_SUFFIXES = (".dcm", ".dicom")
_MAX_FIELD_CHARACTERS = 1 << 24
_FINDING_NAMES = {name.lower(): name for name in FINDINGS} | {
    # NIH ChestX-ray14's and everyday names of the same things.
    "effusion": "Pleural Effusion",
    "infiltration": "Lung Opacity",
    "opacity": "Lung Opacity",
    "mass": "Lung Lesion",
    "nodule": "Lung Lesion",
    "pleural thickening": "Pleural Other",
    "normal": NO_FINDING,
}


@dataclass(frozen=True)
class SourceOptions:
    """How a source is to be read."""

    columns: dict[str, str] = field(default_factory=dict)
    """csv: role (one of `ROLES`) -> column name."""
    image_root: Path | None = None
    """csv: folder that image paths are relative to; none: the CSV's folder."""


def open_source(format: str, path: str | Path, options: SourceOptions | None = None) -> Iterator[Study]:
    """The studies of a source. What can be checked without reading pictures is checked before the first study.

    Raises
    ------
    ConfigError
        Unknown format or column role.
    DataError
        Nothing there, no study in it, or a column is missing.
    SplitError
        The path, or a picture of the CSV, is a phantom's measuring truth.
    NotBuiltError
        A format of a later release.
    """
    options = options or SourceOptions()
    if format in LATER_FORMATS:
        raise NotBuiltError(f"--format {format} is not built yet; there is {' and '.join(FORMATS)}.")
    if format not in FORMATS:
        raise ConfigError(f"--format {format} is unknown; choose one of {', '.join(FORMATS)}.")
    place = Path(path)
    refuse_truth(place)
    if not place.exists():
        raise DataError(f"There is nothing at {place}. Check the path.")
    return iter(_read_csv(place, options) if format == "csv" else _find_dicom_studies(place))


def finding_labels(text: str) -> dict[str, int]:
    """Finding -> FindingStatus from a list of names separated by ; | or , such as "Effusion|Pneumonia".

    Named findings are present; of the others nothing is known, unless the list is "No Finding": then all but devices are absent.
    Names outside the 14 findings and their synonyms are left out.
    """
    names = label_names(text)
    present = {_FINDING_NAMES[name] for name in names if name in _FINDING_NAMES}
    if present == {NO_FINDING}:
        absent = dict.fromkeys((name for name in FINDINGS if name != "Support Devices"), int(FindingStatus.ABSENT))
        return absent | {NO_FINDING: int(FindingStatus.PRESENT)}
    labels = dict.fromkeys(sorted(present - {NO_FINDING}), int(FindingStatus.PRESENT))
    return labels | {NO_FINDING: int(FindingStatus.ABSENT)} if labels else {}


def label_names(text: str) -> list[str]:
    """The names in a list of labels, in lower case, "_" as a space."""
    names = (re.sub(r"[\s_]+", " ", name).strip().lower() for name in re.split(r"[;|,]", text))
    return [name for name in names if name]


def _read_csv(path: Path, options: SourceOptions) -> list[Study]:
    if path.is_dir():
        raise DataError(f"{path} is a folder; --format csv reads one CSV file (--format dicom-dir reads folders).")
    unknown = sorted(set(options.columns) - set(ROLES))
    if unknown:
        raise ConfigError(f"--column {unknown[0]}=...: unknown role; choose from {', '.join(ROLES)}.")
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or ())
            _check_columns(path, header, options.columns)
            rows = [{role: (row.get(column) or "").strip() for role, column in options.columns.items()} for row in reader]
    except csv.Error as error:
        raise DataError(f"{path} is not a readable CSV file ({error}). Export it as comma-separated UTF-8 with a header line.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. Check the path and its permissions.") from error
    root = options.image_root or path.parent
    for folder in {(root / row["image"]).parent for row in rows}:
        refuse_truth(folder)
    studies: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["image"]:
            studies.setdefault(row.get("study") or row["image"], []).append(row)
    if not studies:
        raise DataError(f"{path} has {len(rows)} rows, none with an image. Check the file and --column image=NAME.")
    num_unknown = sum(any(name not in _FINDING_NAMES for name in label_names(row.get("labels", ""))) for row in rows)
    if num_unknown:
        # Their number only: a column taken by mistake may hold anything, reports too.
        logger.warning("%d of %d rows name labels outside the 14 findings; those names are not used (docs/DATA.md)", num_unknown, len(rows))
    return [_csv_study(key, group, root) for key, group in studies.items()]


def _check_columns(path: Path, header: list[str], columns: dict[str, str]) -> None:
    there = f"It has: {', '.join(header[:40]) or 'no header line'}."
    if "image" not in columns:
        raise DataError(f"{path}: which column holds the image files? Give --column image=NAME. {there}")
    missing = [f"{role}={name}" for role, name in columns.items() if name not in header]
    if missing:
        raise DataError(f"{path} has no column for --column {' --column '.join(missing)}. {there}")


def _csv_study(key: str, rows: list[dict[str, str]], root: Path) -> Study:
    def first(role: str) -> str:
        return next((row[role] for row in rows if row.get(role)), "")

    split = first("split").lower()
    if split and split not in _SPLIT_NAMES:
        raise DataError(f"The split column holds '{split[:20]}'; expected train, val or test. Correct it, or leave --column split out.")
    labels: dict[str, int] = {}
    for row in rows:
        labels |= finding_labels(row.get("labels", ""))
    return Study(
        study_id=key,
        patient_id=first("patient") or key,
        images=tuple(StudyImage(path=root / row["image"], view=row.get("view", "")) for row in rows),
        split=_SPLIT_NAMES.get(split, ""),
        report=first("report"),
        labels=labels,
        source="csv",
        licence=first("licence"),
    )


def _find_dicom_studies(root: Path) -> Iterator[Study]:
    if root.is_file():
        raise DataError(f"{root} is a file; --format dicom-dir reads a folder of DICOM files (--format csv reads a CSV).")
    folders = _dicom_folders(root)
    first = next(folders, None)
    if first is None:
        there = sorted({path.suffix or "no suffix" for path in list(root.rglob("*"))[:1000] if path.is_file()})
        raise DataError(f"No .dcm file below {root}. It holds: {', '.join(there[:10]) or 'nothing'}. Check the path or the format.")

    def studies() -> Iterator[Study]:
        yield _dicom_study(root, *first)
        for folder, names in folders:
            yield _dicom_study(root, folder, names)

    return studies()


def _dicom_folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, subfolders, names in os.walk(root):
        # A walk over the folder above meets the truth beside its data.
        subfolders[:] = sorted(name for name in subfolders if not is_truth_folder(Path(folder) / name))
        if any(name.lower().endswith(_DICOM_SUFFIXES) for name in names):
            yield Path(folder), sorted(names)


def _dicom_study(root: Path, folder: Path, names: list[str]) -> Study:
    images = [folder / name for name in names if name.lower().endswith(_DICOM_SUFFIXES)]
    texts = [folder / name for name in names if name.lower().endswith(".txt")]
    texts = [path for path in texts if path.name.lower() == "report.txt"] or texts
    parts = folder.relative_to(root).parts
    given = _SPLIT_NAMES.get(parts[0].lower(), "") if parts else ""
    # Without a header the layout speaks: .../PATIENT/STUDY/IMAGE.dcm, or one folder per patient.
    by_layout = parts[-2] if len(parts) >= 2 + bool(given) else "/".join(parts) or "root"
    return Study(
        study_id="/".join(parts) or ".",
        patient_id=patient_id_of(images[0]) or by_layout,
        images=tuple(StudyImage(path=path) for path in images),
        split=given,
        report="\n".join(path.read_text(encoding="utf-8", errors="replace") for path in texts),
        source="dicom-dir",
    )
