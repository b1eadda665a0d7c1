"""`--format iu-xray`: the Indiana University chest films, in the two layouts in which they go around.

Open-i: ecgen-radiology/N.xml (any folder) + *.png; no official split; `indiana_projections.csv`, where it is there, tells the views.
R2Gen:  annotation.json {train|val|test: [{id, report, image_path: [...]}]} + images/; its split is kept.

Neither layout says in itself which film of a study is lateral.
"""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from ssacl.data.records import Study
from ssacl.data.sources.labels import checked_split
from ssacl.data.sources.options import SourceOptions
from ssacl.data.sources.place import SourcePlace
from ssacl.errors import DataError

_ANNOTATION = "annotation.json"
_PROJECTIONS = "indiana_projections.csv"
_LICENCE = "CC BY-NC-ND 4.0"
_SECTIONS = ("FINDINGS", "IMPRESSION")
logger = logging.getLogger(__name__)


def read_iu_xray(place: SourcePlace, options: SourceOptions) -> Iterator[Study]:
    """The studies of either layout, told by what is there.

    Raises
    ------
    DataError
        Neither is there, or a file is damaged.
    """
    root = SourcePlace(place.storage) if place.key == _ANNOTATION else place
    files = root.files() if not root.key else {}
    annotations = [key for key in files if posixpath.basename(key) == _ANNOTATION]
    reports = [key for key in files if key.lower().endswith(".xml")]
    if annotations:
        return _r2gen(root, files, annotations[0])
    if reports:
        return _open_i(root, files, reports)
    raise DataError(
        f"{place.url} holds neither {_ANNOTATION} nor Open-i's N.xml files. Give the folder that holds one of them and the PNGs."
    )


def _open_i(place: SourcePlace, files: dict[str, int], reports: list[str]) -> Iterator[Study]:
    pictures = {_stem(key): key for key in files if key.lower().endswith((".png", ".jpg", ".dcm"))}
    tables = [key for key in files if posixpath.basename(key).lower() == _PROJECTIONS]
    views = {_stem(row["filename"]): row.get("projection", "") for key in tables for row in place.rows(key) if row.get("filename")}
    if not views:
        logger.warning("no %s: views are unknown, and lateral films count as frontal ones", _PROJECTIONS)

    def image_key(name: str) -> str:
        return pictures.get(_stem(name), name)

    for key, text in zip(reports, place.texts(reports), strict=True):
        root = _parsed(text)
        if root is None:
            raise DataError(f"{place.url}/{key} is not one of Open-i's XML reports, or is damaged. Download it again, or take it away.")
        number = _stem(key)
        sections = {element.get("Label", "").upper(): (element.text or "").strip() for element in root.iter("AbstractText")}
        names = [element.get("id", "") for element in root.iter("parentImage")]
        licence = next((element.get("licenseURL", "") for element in root.iter() if element.get("licenseURL")), "")
        yield Study(
            study_id=number,
            # A report is all that is known of a patient.
            patient_id=number,
            images=tuple(
                place.image(image_key(name), files.get(image_key(name), -1), views.get(_stem(name), "")) for name in names if name
            ),
            # Indication and comparison do not describe the film.
            report="\n\n".join(f"{label}: {sections[label]}" for label in _SECTIONS if sections.get(label)),
            source="iu-xray",
            licence=licence or _LICENCE,
        )


def _r2gen(place: SourcePlace, files: dict[str, int], key: str) -> Iterator[Study]:
    folder = posixpath.dirname(key)
    try:
        tree = json.loads(place.storage.read(key))
        rows: list[tuple[str, dict[str, Any]]] = [(checked_split(split), row) for split, group in tree.items() for row in group]
        studies = [(split, str(row["id"]), str(row["report"]), [str(path) for path in row["image_path"]]) for split, row in rows]
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f"{place.url}/{key} is not R2Gen's: {{split: [{{id, report, image_path}}]}} was expected. Download it again."
        ) from error
    logger.warning("%s names no views: lateral films count as frontal ones", _ANNOTATION)

    def image_key(path: str) -> str:
        candidates = (posixpath.join(folder, "images", path), posixpath.join(folder, path))
        return next((candidate for candidate in candidates if candidate in files), candidates[0])

    for split, study, report, paths in studies:
        yield Study(
            study_id=study,
            patient_id=match.group(0) if (match := re.match(r"CXR\d+", study)) else study,
            images=tuple(place.image(image_key(path), files.get(image_key(path), -1)) for path in paths),
            split=split,
            report=report,
            source="iu-xray",
            licence=_LICENCE,
        )


def _stem(name: str) -> str:
    """What Open-i ("CXR1_1_IM-0001-3001.png") and the table of views ("1_IM-0001-3001.dcm.png") agree in."""
    base = posixpath.basename(name)
    while base.lower().endswith((".png", ".jpg", ".dcm", ".xml")):
        base = base[:-4]
    return re.sub(r"^CXR(\d+)_\1_", r"\1_", base)


def _parsed(text: str) -> ElementTree.Element | None:
    if "<!ENTITY" in text or not text:
        return None
    try:
        # Without entities there is nothing left of what the linter warns of.
        return ElementTree.fromstring(text)  # noqa: S314
    except (ElementTree.ParseError, ValueError):
        return None
