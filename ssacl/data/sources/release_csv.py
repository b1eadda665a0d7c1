"""`--format release-csv`: the tables of the published code, `ANA-MIMIC-{split}.csv` (image_id, image_path, report, prompt, anatomies).

`prompt` (the entities of the report) and `anatomies` (the tree of its sentences) are read off the very report that a model is to write.
They are not used: a data set that carries them hands the answer to whoever evaluates on it. What a report speaks of is read by our own
labeler, for training only; at inference the findings head predicts it.
"""

from __future__ import annotations

import posixpath
import re

from ssacl.data.records import Study
from ssacl.data.sources.labels import checked_split
from ssacl.data.sources.mimic import LICENCE
from ssacl.data.sources.options import SourceOptions
from ssacl.data.sources.place import SourcePlace
from ssacl.errors import DataError

_TABLE = re.compile(r"^ANA-MIMIC-([A-Za-z]+)\.csv(?:\.gz)?$")
_COLUMNS = ("image_id", "image_path", "report")
_MIMIC_PATH = re.compile(r"(?:files/)?p\d{2}/p(\d{8})/s(\d{8})/[^/]+$")


def read_release_csv(place: SourcePlace, options: SourceOptions) -> list[Study]:
    """The studies of one table, or of all tables in a folder; the split is in the file name.

    Raises
    ------
    DataError
        No such table, a column is missing, or the split of the name is none.
    """
    names = [place.key] if place.key else [key for key in place.files() if _TABLE.match(key)]
    if not names:
        raise DataError(f"No ANA-MIMIC-train.csv, -val.csv or -test.csv in {place.url}. Give one of them, or their folder.")
    images = SourcePlace.at(options.image_root) if options.image_root else place
    sizes = images.files()
    studies: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for name in names:
        match = _TABLE.match(name)
        split = checked_split(match.group(1)) if match else ""
        missing = [column for column in _COLUMNS if column not in place.header(name)]
        if missing:
            raise DataError(f"{place.storage.url}/{name} has no column {', '.join(missing)}; a release table has {', '.join(_COLUMNS)}.")
        for row in place.rows(name):
            path, patient, study = _located(row["image_path"], row["image_id"], sizes)
            studies.setdefault((split, patient, study), []).append((path, row["report"]))
    return [
        Study(
            study_id=study,
            patient_id=patient,
            images=tuple(images.image(path, sizes.get(path, -1)) for path, _ in rows),
            split=split,
            report=next((report for _, report in rows if report), ""),
            source="release-csv",
            licence=LICENCE,
        )
        for (split, patient, study), rows in studies.items()
    ]


def _located(path: str, image_id: str, sizes: dict[str, int]) -> tuple[str, str, str]:
    """Where a picture lies, its patient and its study. Paths of the machine that made the table are cut to the part that MIMIC names."""
    match = _MIMIC_PATH.search(path.replace("\\", "/"))
    if not match:
        return posixpath.normpath(path), image_id, image_id
    tail = match.group(0)
    places = (posixpath.normpath(path), tail, f"files/{tail}", tail.removeprefix("files/"))
    return next((place for place in places if place in sizes), tail), f"p{match.group(1)}", f"s{match.group(2)}"
