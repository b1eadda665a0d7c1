"""`--format mimic-cxr` and `mimic-cxr-jpg`: the layout that PhysioNet ships.

files/p10/p10000032/s50414267/*.dcm|*.jpg    pictures, named by dicom_id
files/p10/p10000032/s50414267.txt            reports: mimic-cxr-reports.zip, unpacked here or at --reports
mimic-cxr-2.0.0-split.csv.gz                 dicom_id, study_id, subject_id, split
mimic-cxr-2.0.0-metadata.csv.gz              dicom_id, ..., ViewPosition, ...
mimic-cxr-2.0.0-chexpert.csv.gz              subject_id, study_id, one column per finding

What counts are the files that are there: a part of the set may have been downloaded. The tables say what is known of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ssacl.data.records import Study
from ssacl.data.sources.labels import checked_split, chexpert_labels
from ssacl.data.sources.options import SourceOptions
from ssacl.data.sources.place import SourcePlace
from ssacl.errors import DataError

LICENCE = "PhysioNet Credentialed Health Data License 1.5.0"
logger = logging.getLogger(__name__)

_PICTURE = re.compile(r"^(?:files/)?p\d{2}/p(\d{8})/s(\d{8})/([^/]+)\.\w+$")
_REPORT = re.compile(r"(?:^|/)p\d{2}/p\d{8}/s(\d{8})\.txt$")
_TABLE = re.compile(r"^mimic-cxr-[\d.]+-(split|metadata|chexpert)\.csv(?:\.gz)?$")


@dataclass
class _Tables:
    splits: dict[str, str] = field(default_factory=dict)
    """dicom_id -> split."""
    subject_splits: dict[str, str] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    """dicom_id -> ViewPosition."""
    labels: dict[str, dict[str, int]] = field(default_factory=dict)
    """study_id -> labels."""


def read_mimic(place: SourcePlace, options: SourceOptions, suffix: str) -> Iterator[Study]:
    """The studies of MIMIC-CXR (`suffix` .dcm) or MIMIC-CXR-JPG (.jpg), with their official splits.

    Raises
    ------
    DataError
        No picture in this layout, or a table without the columns that it has in the release.
    """
    name = "mimic-cxr" if suffix == ".dcm" else "mimic-cxr-jpg"
    if place.key:
        raise DataError(f"{place.url} is a file; --format {name} reads the folder that holds files/ and the CSV.gz tables.")
    files = place.files()
    studies: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for key in files:
        match = _PICTURE.match(key) if key.lower().endswith(suffix) else None
        if match:
            subject, study, dicom = match.groups()
            studies.setdefault((subject, study), []).append((dicom, key))
    if not studies:
        raise DataError(
            f"No files/pNN/pNNNNNNNN/sNNNNNNNN/*{suffix} below {place.url}. Give the folder that holds files/, "
            f"or --format {'mimic-cxr-jpg' if suffix == '.dcm' else 'mimic-cxr'} for the other kind of pictures."
        )
    tables = _read_tables(place, [key for key in files if "/" not in key])
    num_absent = len(set(tables.splits) - {dicom for pictures in studies.values() for dicom, _ in pictures})
    if num_absent:
        logger.warning("%d of %d pictures of the split table are not here and are left out", num_absent, len(tables.splits))
    if not tables.views and suffix == ".jpg":
        logger.warning("no metadata table: the views are unknown, and lateral films count as frontal ones")
    return _studies(place, options, files, studies, tables, name)


def _studies(
    place: SourcePlace,
    options: SourceOptions,
    files: dict[str, int],
    studies: dict[tuple[str, str], list[tuple[str, str]]],
    tables: _Tables,
    name: str,
) -> Iterator[Study]:
    reports = SourcePlace.at(options.reports) if options.reports else place
    texts = {match.group(1): key for key in (reports.files() if options.reports else files) if (match := _REPORT.search(key))}
    if not texts:
        logger.warning("no report found: unpack mimic-cxr-reports.zip beside files/, or give its folder as --reports")
    ahead = reports.texts(texts.get(study, "") for _, study in studies)
    for ((subject, study), pictures), report in zip(studies.items(), ahead, strict=True):
        splits = [tables.splits[dicom] for dicom, _ in pictures if dicom in tables.splits]
        yield Study(
            study_id=f"s{study}",
            patient_id=f"p{subject}",
            images=tuple(place.image(key, files[key], tables.views.get(dicom, "")) for dicom, key in pictures),
            # The release splits by patient: a picture that the table leaves out goes with the patient's others.
            split=splits[0] if splits else tables.subject_splits.get(subject, ""),
            report=report,
            labels=tables.labels.get(study, {}),
            source=name,
            licence=LICENCE,
        )


def _read_tables(place: SourcePlace, names: list[str]) -> _Tables:
    tables = _Tables()
    for name in sorted(names):
        match = _TABLE.match(name)
        if not match:
            continue
        kind = match.group(1)
        needed = {"split": ("dicom_id", "subject_id", "split"), "metadata": ("dicom_id", "ViewPosition"), "chexpert": ("study_id",)}[kind]
        for row in place.rows(name):
            if not row.keys() >= set(needed):
                raise DataError(f"{place.url}/{name} has not the columns {', '.join(needed)}. Download it again.")
            if kind == "split":
                split = checked_split(row["split"])
                tables.splits[row["dicom_id"]] = tables.subject_splits[row["subject_id"]] = split
            elif kind == "metadata":
                tables.views[row["dicom_id"]] = row["ViewPosition"]
            else:
                tables.labels[row["study_id"]] = chexpert_labels(row)
    return tables
