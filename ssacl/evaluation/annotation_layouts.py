"""The layouts that annotations come in, each found by its files.

COCO     one `*.json` with `images`, `annotations` (`bbox` x, y, width, height in px) and `categories`; films in the folder or `images/`.
MS-CXR   the same, where annotations have `label_text` (the phrase) and images a `path` as in MIMIC-CXR-JPG (`files/p10/p10.../s.../X.jpg`).
masks    `images/NAME.png` and `masks/LABEL/NAME.png`, not 0 where the label is; optional `images.csv` (`file`, `patient_group`).
tables   `images/`, `images.csv` (`file`, `patient_group`), `boxes.csv` (`file`, `label`, `x0`..`y1`) and/or `masks.csv` (`file`, `mask`,
         `label`; the label `lungs` has 1 for the right and 2 for the left lung).
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from ssacl.errors import DataError
from ssacl.evaluation.annotations import (
    Annotations,
    Asked,
    Film,
    Problems,
    Target,
    asked_of_label,
    film_size,
    has_sound_mask,
    kept_boxes,
)
from ssacl.inference.report import Box

logger = logging.getLogger(__name__)

_LUNG_VALUES = {"right lung": 1, "left lung": 2}
_MIMIC_PATIENT = re.compile(r"(?:^|/)(p\d{8})(?:/|$)")
_FILM_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


def read_annotations(folder: str | Path, *, leave_out_bad: bool = False) -> Annotations:
    """Read a folder of films with boxes or masks, in any of the module's layouts.

    Parameters
    ----------
    folder
        On disk.
    leave_out_bad
        Leave out, and count, what cannot be used, instead of refusing.

    Raises
    ------
    DataError
        No layout is there, or a table is damaged, or annotations are bad (counts by problem), or none is left.
    """
    place, problems = Path(folder), Problems()
    if not place.is_dir():
        raise DataError(f"There is no folder {place.name}; --data takes a folder of films with boxes or masks (docs/GROUNDING.md).")
    json_files = sorted(place.glob("*.json"))
    if (place / "boxes.csv").is_file() or (place / "masks.csv").is_file():
        layout, films, known = _tables(place, problems)
    elif (place / "masks").is_dir():
        layout, films, known = _mask_folders(place, problems)
    elif len(json_files) == 1:
        layout, films, known = _coco(place, json_files[0], problems)
    else:
        raise DataError(
            f"{place.name} holds no layout that is known: boxes.csv or masks.csv, a folder masks/LABEL, or exactly one COCO or MS-CXR JSON "
            f"file were expected ({len(json_files)} JSON files are there)."
        )
    left_out = problems.settle(leave_out_bad)
    films = [film for film in films if film.targets]
    if not films:
        raise DataError(f"No film with a usable annotation is left in {place.name} (layout {layout}; left out: {left_out or 'nothing'}).")
    return Annotations(layout, tuple(sorted(films, key=lambda film: film.path)), left_out, known)


def _coco(place: Path, file: Path, problems: Problems) -> tuple[str, list[Film], bool]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        images = {row["id"]: row for row in tree["images"]}
        categories = {row["id"]: str(row["name"]) for row in tree["categories"]}
        rows: list[dict[str, Any]] = tree["annotations"]
        phrased = any("label_text" in row for row in rows)
        boxes: dict[Any, dict[Asked | str, list[Box]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row["image_id"] not in images:
                problems.add("annotation of no listed image")
                continue
            x, y, width, height = (float(value) for value in row["bbox"])
            category = categories[row["category_id"]]
            asked = Asked("phrase", category, str(row["label_text"]).strip()) if phrased else asked_of_label(category)
            if asked is None:
                problems.add("unknown label", category)
                continue
            boxes[row["image_id"]][asked].append(Box(x, y, x + width, y + height))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file.name} is no COCO file: images (id, file_name), annotations (image_id, category_id, bbox of 4 numbers) and categories "
            f"(id, name) were expected; {type(error).__name__} at {str(error)[:40]}."
        ) from error
    films, known = [], True
    for image_id, targets in boxes.items():
        row, count = images[image_id], sum(len(each) for each in targets.values())
        path = _coco_film(place, row)
        size = film_size(path, problems, count)
        if size is None:
            continue
        if "width" in row and (int(row["width"]), int(row["height"])) != size:
            problems.add("image of another size than its annotation says", count=count)
            continue
        patient = _MIMIC_PATIENT.search(str(row.get("path", row.get("file_name", ""))))
        known = known and patient is not None
        films.append(Film(path, patient[1] if patient else path.stem, _box_targets(targets, size, problems), *size))
    return ("MS-CXR" if phrased else "COCO"), films, known


def _coco_film(place: Path, row: dict[str, Any]) -> Path:
    """The film of an image row, wherever it lies; a path that is not there when it lies nowhere."""
    names = [str(row[key]) for key in ("path", "file_name") if row.get(key)]
    candidates = [place / folder / name for name in names for folder in ("", "images")]
    inside = [path for path in candidates if place.resolve() in path.resolve().parents]
    return next((path for path in inside if path.is_file()), place / "no such film")


def _mask_folders(place: Path, problems: Problems) -> tuple[str, list[Film], bool]:
    patients = _patients(place)
    films = []
    found = sorted(path for path in (place / "images").glob("*") if path.suffix.lower() in _FILM_SUFFIXES)
    labels = sorted(path for path in (place / "masks").iterdir() if path.is_dir())
    asked = {folder.name: _asked_of_mask(folder.name) for folder in labels}
    for folder in labels:
        if not asked[folder.name]:
            problems.add("unknown label", folder.name, count=len(list(folder.glob("*"))))
    stems = {path.stem for path in found}
    for folder in labels:
        if alone := [path for path in folder.iterdir() if path.stem not in stems]:
            problems.add("missing image", count=len(alone))
    for path in found:
        drawn = [(target, folder / f"{path.stem}.png") for folder in labels for target in asked[folder.name]]
        targets = [Target(each, mask_path=mask, mask_value=value) for (each, value), mask in drawn if mask.is_file()]
        if targets and (size := film_size(path, problems, len(targets))):
            sound = tuple(target for target in targets if has_sound_mask(target, *size, problems))
            films.append(Film(path, patients.get(path.name, path.stem), sound, *size))
    return "mask folders", films, bool(patients)


def _tables(place: Path, problems: Problems) -> tuple[str, list[Film], bool]:
    patients = _patients(place)
    boxes: dict[str, dict[Asked | str, list[Box]]] = defaultdict(lambda: defaultdict(list))
    masks: dict[str, list[Target]] = defaultdict(list)
    for row in _rows(place / "boxes.csv", ("file", "label", "x0", "y0", "x1", "y1")):
        asked = asked_of_label(row["label"])
        # The extent of a mask that is there itself says nothing more.
        if row.get("kind", "").endswith("_from_mask"):
            continue
        if asked is None:
            problems.add("unknown label", row["label"])
            continue
        try:
            box = Box(*(float(row[edge]) for edge in ("x0", "y0", "x1", "y1")))
        except ValueError as error:
            raise DataError(f"boxes.csv has an edge that is no number (label '{row['label']}').") from error
        boxes[row["file"]][asked].append(box)
    for row in _rows(place / "masks.csv", ("file", "mask", "label")):
        found = _asked_of_mask(row["label"])
        if not found:
            problems.add("unknown label", row["label"])
        masks[row["file"]] += [Target(each, mask_path=place / row["mask"], mask_value=value) for each, value in found]
    films, again = [], 0
    for name in sorted({*boxes, *masks}):
        count = sum(len(each) for each in boxes[name].values()) + len(masks[name])
        size = film_size(place / "images" / name, problems, count)
        if size is None:
            continue
        targets = _box_targets(boxes[name], size, problems)
        sound = {target.asked: target for target in reversed(masks[name]) if has_sound_mask(target, *size, problems)}
        again += len(masks[name]) - len({target.asked for target in masks[name]})
        films.append(Film(place / "images" / name, patients.get(name, name), targets + tuple(sound.values()), *size))
    if again:
        logger.info("%d masks show what another mask of the same film shows; the first of the table counts", again)
    return "tables", films, bool(patients)


def _box_targets(boxes: dict[Asked | str, list[Box]], size: tuple[int, int], problems: Problems) -> tuple[Target, ...]:
    """One target per thing asked for: its boxes joined, as the phrase or label speaks of all of them."""
    kept = {asked: kept_boxes(each, *size, problems) for asked, each in boxes.items()}
    return tuple(Target(asked, boxes=each) for asked, each in kept.items() if each and isinstance(asked, Asked))


def _asked_of_mask(label: str) -> list[tuple[Asked, int | None]]:
    """(what is asked, pixel value) of a mask's label; the label `lungs` holds both lungs."""
    if label == "lungs":
        return [(Asked("anatomy", node, node), value) for node, value in _LUNG_VALUES.items()]
    asked = asked_of_label(label)
    return [] if asked is None else [(asked, None)]


def _patients(place: Path) -> dict[str, str]:
    """File -> patient, from images.csv; empty where there is none."""
    if not (place / "images.csv").is_file():
        return {}
    return {row["file"]: row["patient_group"] or row["file"] for row in _rows(place / "images.csv", ("file", "patient_group"))}


def _rows(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a table; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{path.name} has no column '{missing[0]}'; expected {', '.join(columns)}.")
        return list(reader)
