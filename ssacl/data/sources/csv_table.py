"""`--format csv`: one table of pictures and reports, its columns named by role."""

from __future__ import annotations

import logging
import posixpath

from ssacl.data.records import Study
from ssacl.data.sources.labels import checked_split, finding_labels, has_unknown_label
from ssacl.data.sources.options import ROLES, SourceOptions
from ssacl.data.sources.place import SourcePlace
from ssacl.data.storage import FolderStorage, open_storage
from ssacl.data.truth_guard import refuse_truth
from ssacl.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def read_csv(place: SourcePlace, options: SourceOptions) -> list[Study]:
    """The studies of a CSV file; rows with the same `study` are one study."""
    if not place.key:
        raise DataError(f"{place.url} is a folder; --format csv reads one CSV file (--format dicom-dir reads folders).")
    unknown = sorted(set(options.columns) - set(ROLES))
    if unknown:
        raise ConfigError(f"--column {unknown[0]}=...: unknown role; choose from {', '.join(ROLES)}.")
    _check_columns(place.url, place.header(place.key), options.columns)
    rows = [{role: row.get(column, "") for role, column in options.columns.items()} for row in place.rows(place.key)]
    images = SourcePlace(open_storage(options.image_root)) if options.image_root else place
    sizes = _sizes(images, [row["image"] for row in rows])
    studies: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["image"]:
            studies.setdefault(row.get("study") or row["image"], []).append(row)
    if not studies:
        raise DataError(f"{place.url} has {len(rows)} rows, none with an image. Check the file and --column image=NAME.")
    num_unknown = sum(has_unknown_label(row.get("labels", "")) for row in rows)
    if num_unknown:
        # Their number only: a column taken by mistake may hold anything, reports too.
        logger.warning("%d of %d rows name labels outside the 14 findings; those names are not used (docs/DATA.md)", num_unknown, len(rows))
    return [_study(key, group, images, sizes) for key, group in studies.items()]


def _sizes(images: SourcePlace, names: list[str]) -> dict[str, int]:
    """Bytes of pictures in storage, where they are listed at no further cost; local ones are looked at when they are planned."""
    if not isinstance(images.storage, FolderStorage):
        return images.files()
    for folder in {images.storage.root / posixpath.dirname(name) for name in names if "://" not in name}:
        refuse_truth(folder)
    return {}


def _check_columns(url: str, header: list[str], columns: dict[str, str]) -> None:
    there = f"It has: {', '.join(header[:40]) or 'no header line'}."
    if "image" not in columns:
        raise DataError(f"{url}: which column holds the image files? Give --column image=NAME. {there}")
    missing = [f"{role}={name}" for role, name in columns.items() if name not in header]
    if missing:
        raise DataError(f"{url} has no column for --column {' --column '.join(missing)}. {there}")


def _study(key: str, rows: list[dict[str, str]], images: SourcePlace, sizes: dict[str, int]) -> Study:
    def first(role: str) -> str:
        return next((row[role] for row in rows if row.get(role)), "")

    labels: dict[str, int] = {}
    for row in rows:
        labels |= finding_labels(row.get("labels", ""))
    return Study(
        study_id=key,
        patient_id=first("patient") or key,
        images=tuple(images.image(row["image"], sizes.get(posixpath.normpath(row["image"]), -1), row.get("view", "")) for row in rows),
        split=checked_split(first("split")),
        report=first("report"),
        labels=labels,
        source="csv",
        licence=first("licence"),
    )
