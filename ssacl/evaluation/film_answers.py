"""What a model answers about annotated films, in one condition: maps of all that is asked, landmarks and pose.

Answers are kept in a folder as they come, so that an evaluation that was interrupted goes on where it stopped.

Shape letters: S side of the square, g side of a map.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import NODE_INDEX
from ssacl.data.dicom import Picture, read_picture
from ssacl.data.transforms import load_square
from ssacl.errors import DataError
from ssacl.evaluation.annotations import Asked, Film
from ssacl.evaluation.conditions import Pose, pose_of
from ssacl.evaluation.lung_landmarks import LANDMARK_NODES
from ssacl.inference.generator import ReportGenerator
from ssacl.inference.grounding import Look, understand
from ssacl.scores.map_measures import map_centroids

SQUARE_PX = 448
"""Side at which a film is moved: twice the largest model input in use, so that moving it loses nothing that a model sees."""


@dataclass(frozen=True)
class Answer:
    """A system's answer about one film in one condition, over the model's square."""

    maps: dict[Asked, NDArray[np.float32]]
    """[g, g] each, non-negative."""
    landmarks: NDArray[np.float64] | None = None
    """[12, 2] in half-widths, before any offset."""
    pose: NDArray[np.float64] | None = None
    """[2, 3] atlas' frame -> square."""


def film_digest(film: Film) -> str:
    """See `file_digest`."""
    return file_digest(film.path)


def file_digest(path: Path) -> str:
    """sha256 of a film's stored pixels (DICOM) or file, as ingest keeps it in a sample's provenance."""
    content = path.read_bytes()
    if path.suffix.lower() in (".dcm", ".dicom"):
        return read_picture(content, path.name).pixel_digest
    return hashlib.sha256(content).hexdigest()


def film_key(film: Film) -> str:
    """What the random poses of a film follow: its file name, so that it keeps its pose whatever films stand beside it."""
    return hashlib.sha256(film.path.name.encode()).hexdigest()


def film_pose(film: Film, condition: str, seed: int = 0) -> Pose:
    """The film's pose in a condition."""
    return pose_of(condition, film_key(film), film.width_px, film.height_px, seed)


def posed_picture(film: Film, pose: Pose, square_px: int = SQUARE_PX) -> Picture:
    """The film as a model gets it: as it is, or the moved square [square_px, square_px] uint8.

    Raises
    ------
    ImageError
        The film cannot be read.
    """
    picture = read_picture(film.path.read_bytes(), film.path.name)
    if pose.is_identity:
        return picture
    square, _ = load_square(picture.pixels, square_px)
    return Picture(pixels=(pose.moved_image(square) * 255).round().clip(0, 255).astype(np.uint8))


def ask_films(
    generator: ReportGenerator,
    films: Sequence[Film],
    condition: str,
    kept_in: Path | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
) -> list[Answer]:
    """The answers of a model about every film, in order.

    Parameters
    ----------
    kept_in
        Folder for answers; those that are there already are not asked again.
    progress
        Called with 1 after every film.

    Raises
    ------
    ImageError, GenerationError
        A film cannot be read, or the weights give values that are not finite.
    """
    answers = []
    for film in films:
        asked = list(dict.fromkeys(target.asked for target in film.targets))
        file = None if kept_in is None else kept_in / f"{_name(generator.model_version, film, condition, asked, seed)}.npz"
        answer = None if file is None else _kept(file, asked)
        if answer is None:
            answer = _answer(generator.look(posed_picture(film, film_pose(film, condition, seed))), asked)
            if file is not None:
                _keep(file, answer)
        answers.append(answer)
        if progress is not None:
            progress(1)
    return answers


def _answer(look: Look, asked: Sequence[Asked]) -> Answer:
    maps = {}
    for each in asked:
        if each.kind == "anatomy":
            maps[each] = look.anatomy_maps[NODE_INDEX[each.group]]
        else:
            maps[each] = look.evidence(each.words, understand(each.words))
    landmarks = map_centroids(look.anatomy_maps[list(LANDMARK_NODES)][None])[0]
    return Answer(maps, landmarks, look.pose.astype(np.float64))


def _name(model_version: str, film: Film, condition: str, asked: Sequence[Asked], seed: int) -> str:
    """A file name that changes with whatever the answer depends on."""
    parts = (model_version, film_digest(film), film_key(film), condition, str(seed), *(f"{each.kind}|{each.words}" for each in asked))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _keep(file: Path, answer: Answer) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        np.savez(stream, maps=np.stack(list(answer.maps.values())), landmarks=np.asarray(answer.landmarks), pose=np.asarray(answer.pose))
    os.replace(partial, file)


def _kept(file: Path, asked: Sequence[Asked]) -> Answer | None:
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            return Answer(dict(zip(asked, stored["maps"], strict=True)), stored["landmarks"], stored["pose"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{file.name} in the folder of answers is damaged; delete that folder and run again.") from error
