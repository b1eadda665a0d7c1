"""The layouts that films with masks come in.

siim   `*rle.csv` (`ImageId`, `EncodedPixels`: relative run lengths or -1, a row per mask) and `ImageId.dcm` anywhere below. Patients are
       those of the DICOM headers.
masks  `masks/LABEL/NAME.png` and `images/`, or `masks.csv` with `images.csv`: the layouts of `ssacl evaluate grounding`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssacl.data.dicom import MAX_PIXELS
from ssacl.data.geometry import pixel_aspect, squared, upright
from ssacl.errors import ConfigError, DataError
from ssacl.evaluation.annotation_layouts import read_annotations
from ssacl.evaluation.annotations import Film, Problems, square_target
from ssacl.evaluation.downstream.films import ABSENT, PRESENT, UNKNOWN, TaskFilm, TaskSet
from ssacl.evaluation.downstream.label_layouts import read_table
from ssacl.evaluation.downstream.run_length import EMPTY, decode
from ssacl.evaluation.downstream.splits import split_patients
from ssacl.evaluation.truth import square_masks

PNEUMOTHORAX = "pneumothorax"
_SIIM_TABLES = "*rle*.csv"


@dataclass(frozen=True)
class MaskSet:
    """Films with masks. The labels of the films say whether a structure is drawn (`PRESENT`), known to be absent, or unknown."""

    task: TaskSet
    runs: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """SIIM: film id -> run lengths."""
    drawn: dict[str, Film] = field(default_factory=dict, repr=False)
    """Other layouts: film id -> what is drawn on it."""

    def masks(self, film: TaskFilm, side_px: int) -> NDArray[np.bool_]:
        """[structures, side_px, side_px] over the model's square; no pixels where nothing is drawn.

        Raises
        ------
        DataError
            A mask does not belong to its film, or cannot be read.
        """
        if film.id in self.runs:
            return _siim_mask(film, self.runs[film.id], side_px)[None]
        found = np.zeros((len(self.task.names), side_px, side_px), dtype=bool)
        for target in self.drawn[film.id].targets:
            if target.drawn_as == "mask" and target.asked.group in self.task.names:
                found[self.task.names.index(target.asked.group)] |= square_target(self.drawn[film.id], target, side_px)
        return found


def read_masks(place: str | Path, structures: Sequence[str] = (), seed: int = 0, leave_out_bad: bool = False) -> MaskSet:
    """The films of a folder, split by patients.

    Parameters
    ----------
    structures
        Names to segment; all that are drawn if none.

    Raises
    ------
    ConfigError
        A structure is not drawn anywhere.
    DataError
        No layout is there, tables are damaged, or films or masks are missing.
    """
    folder = Path(place)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder.name}; --data takes a folder of films with masks.")
    tables = sorted(folder.glob(_SIIM_TABLES))
    if len(tables) > 1:
        raise DataError(f"{len(tables)} tables {_SIIM_TABLES} in {folder.name}; exactly one was expected.")
    return _siim(folder, tables[0], structures, seed, leave_out_bad) if tables else _drawn(folder, structures, seed, leave_out_bad)


def _siim(folder: Path, table: Path, structures: Sequence[str], seed: int, leave_out_bad: bool) -> MaskSet:
    _check_structures(structures, (PNEUMOTHORAX,))
    runs: dict[str, list[str]] = defaultdict(list)
    for row in read_table(table, ("ImageId", "EncodedPixels")):
        runs[row["ImageId"]].append(row["EncodedPixels"])
    if contradicted := sum(EMPTY in each and len({*each}) > 1 for each in runs.values()):
        raise DataError(f"{table.name} says of {contradicted} films that they have a mask and that they have none (-1); correct its rows.")
    files = {path.stem: path for path in folder.rglob("*.dcm")}
    problems, films = Problems(), []
    for name, masks in runs.items():
        if name not in files:
            problems.add("missing image")
        elif (patient := _patient(files[name])) is None:
            problems.add("unreadable image")
        else:
            films.append(TaskFilm(name, patient or name, (ABSENT if EMPTY in masks else PRESENT,), files[name]))
    left_out = problems.settle(leave_out_bad)
    task = TaskSet("siim", (PNEUMOTHORAX,), split_patients(films, seed), f"patients dealt by seed {seed}", left_out)
    return MaskSet(task, {name: tuple(each) for name, each in runs.items()})


def _patient(path: Path) -> str | None:
    """A hash of the header's PatientID, empty where it has none; None where the file is no DICOM file."""
    import pydicom

    try:
        ds = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        name = str(ds.get("PatientID") or "")
    # The reader raises whatever it likes on damaged files, and its texts may quote the header.
    except Exception:
        return None
    return hashlib.sha256(name.encode()).hexdigest() if name else ""


def _siim_mask(film: TaskFilm, runs: Sequence[str], side_px: int) -> NDArray[np.bool_]:
    """Runs are counted on the stored pixels. The film that a model sees has been made square and turned upright: so is its mask."""
    import pydicom

    assert isinstance(film.place, Path)
    ds = pydicom.dcmread(film.place, stop_before_pixels=True)
    mask = np.zeros((int(ds.Rows), int(ds.Columns)), dtype=bool)
    for each in runs:
        mask |= decode(each, mask.shape[1], mask.shape[0])
    grey = squared(np.where(mask, np.uint8(255), np.uint8(0)), pixel_aspect(ds), MAX_PIXELS)
    turned = upright(grey, ds, lateral=False) > 127
    found: NDArray[np.bool_] = square_masks(turned[None], side_px)[0]
    return found


def _drawn(folder: Path, structures: Sequence[str], seed: int, leave_out_bad: bool) -> MaskSet:
    annotations = read_annotations(folder, leave_out_bad=leave_out_bad)
    groups = {film.path.name: {target.asked.group for target in film.targets if target.drawn_as == "mask"} for film in annotations.films}
    known = tuple(sorted({group for each in groups.values() for group in each}))
    _check_structures(structures, known)
    names = tuple(structures) or known
    films = [
        TaskFilm(film.path.name, film.patient, tuple(PRESENT if name in groups[film.path.name] else UNKNOWN for name in names), film.path)
        for film in annotations.films
        if groups[film.path.name] & {*names}
    ]
    how = f"patients dealt by seed {seed}"
    task = TaskSet(annotations.layout, names, split_patients(films, seed), how, annotations.left_out, annotations.patients_known)
    return MaskSet(task, drawn={film.path.name: film for film in annotations.films})


def _check_structures(asked: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(f"No mask shows '{unknown[0]}'; expected some of: {', '.join(known) or 'none is there'}.")
