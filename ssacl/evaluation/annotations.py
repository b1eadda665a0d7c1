"""Films with boxes or masks drawn on them, in one form whatever the layout they came in. Only evaluation may read them.

A target is one thing asked of one film: a label's boxes joined, or a mask. What cannot be read is refused by name with counts; with
`leave_out` it is left out and counted. Messages hold labels and counts, never a file name: names of films may be patients'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ssacl.anatomy import NODE_INDEX, NODES
from ssacl.errors import DataError
from ssacl.evaluation.truth import square_masks
from ssacl.inference.grounding import understand
from ssacl.inference.report import Box

BOX_TOLERANCE_PX = 1.0
"""A box may reach this far over the image's edge: annotation tools round."""
PROBLEMS = (
    "missing image",
    "unreadable image",
    "image of another size than its annotation says",
    "box outside of the image",
    "box without area",
    "missing mask",
    "mask of another size than its image",
    "empty mask",
    "unknown label",
    "annotation of no listed image",
)
_NODE_OF_LABEL = {"cardiomediastinum": "mediastinum", "airways": "trachea", "heart": "cardiac silhouette", "diaphragm": ""}
_WORDS_OF_LABEL = {
    "tubings": "tube",
    "monitoring probes": "monitoring leads",
    "infiltrate": "infiltration",
    "effusion": "pleural effusion",
}


@dataclass(frozen=True)
class Asked:
    """What a label or phrase asks for."""

    kind: str
    """`anatomy` (a node), `finding` (a label that names one) or `phrase` (words of a report)."""
    group: str
    """What figures are gathered by: the node, the label, or the category of a phrase."""
    words: str
    """What the model is asked; the node's name for anatomy."""


@dataclass(frozen=True)
class Target:
    """Something drawn on a film: the union of `boxes`, or the pixels of a mask."""

    asked: Asked
    boxes: tuple[Box, ...] = ()
    mask_path: Path | None = None
    mask_value: int | None = None
    """The mask's pixels of this value; None: all that are not 0."""

    @property
    def drawn_as(self) -> str:
        return "box" if self.boxes else "mask"


@dataclass(frozen=True)
class Film:
    """A film and its targets."""

    path: Path
    patient: str
    """Films of one patient are never on both sides of anything that is fitted."""
    targets: tuple[Target, ...]
    width_px: int
    height_px: int


@dataclass(frozen=True)
class Annotations:
    """All that a folder holds."""

    layout: str
    films: tuple[Film, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    """Problem -> annotations (or films) left out because of it."""
    patients_known: bool = True
    """Else every film counts as a patient of its own."""


class Problems:
    """Counts what is wrong while a layout is read, and refuses at the end."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()

    def add(self, problem: str, label: str = "", count: int = 1) -> None:
        """Count `count` annotations with a problem of `PROBLEMS`."""
        assert problem in PROBLEMS, problem
        self.counts[problem] += count
        if label:
            self._labels[label] += count

    def settle(self, leave_out: bool) -> dict[str, int]:
        """The counts by problem.

        Raises
        ------
        DataError
            There are any, and they were not to be left out.
        """
        if self.counts and not leave_out:
            found = "; ".join(f"{problem}: {count}" for problem, count in sorted(self.counts.items()))
            labels = ", ".join(f"'{label}' ({count})" for label, count in self._labels.most_common(5))
            named = f" Unknown labels: {labels}; a label must name an anatomy node or a finding." if labels else ""
            raise DataError(
                f"Annotations cannot be used: {found}.{named} Correct them, or leave them out, counted on the card, with --leave-out-bad."
            )
        return dict(sorted(self.counts.items()))


def asked_of_label(label: str, kind: str = "") -> Asked | None:
    """What a label asks for: a node by its name, else a finding; None when it names neither.

    `right_lung`, `Right Lung` and `right lung` are one.
    """
    words = " ".join(label.replace("_", " ").split()).lower()
    node = _NODE_OF_LABEL.get(words, words)
    if node in NODE_INDEX:
        return Asked("anatomy", node, node)
    words = _WORDS_OF_LABEL.get(words, words)
    if not words:
        return None
    meaning = understand(words)
    if meaning.finding is None and not meaning.anatomy:
        return None
    return Asked(kind or "finding", words, words)


def film_size(path: Path, problems: Problems, count: int = 1) -> tuple[int, int] | None:
    """(width, height) of a film's file, or None, counted for `count` annotations."""
    if not path.is_file():
        problems.add("missing image", count=count)
        return None
    try:
        if path.suffix.lower() in (".dcm", ".dicom"):
            from ssacl.data.dicom import read_picture

            pixels = read_picture(path.read_bytes(), path.name).pixels
            return pixels.shape[1], pixels.shape[0]
        with Image.open(path) as image:
            return image.size
    except (OSError, UnidentifiedImageError, DataError):
        problems.add("unreadable image", count=count)
        return None


def kept_boxes(boxes: Iterable[Box], width_px: int, height_px: int, problems: Problems) -> tuple[Box, ...]:
    """The boxes that lie on the film, cut at its edge; the others are counted."""
    kept = []
    for box in boxes:
        edges = np.array([box.x0, box.y0, box.x1, box.y1])
        over = max(-box.x0, -box.y0, box.x1 - width_px, box.y1 - height_px)
        if not np.isfinite(edges).all() or box.x1 <= box.x0 or box.y1 <= box.y0:
            problems.add("box without area")
        elif over > BOX_TOLERANCE_PX:
            problems.add("box outside of the image")
        else:
            kept.append(Box(max(box.x0, 0.0), max(box.y0, 0.0), min(box.x1, width_px), min(box.y1, height_px)))
    return tuple(kept)


def read_mask(target: Target) -> NDArray[np.bool_]:
    """[H, W] the target's mask file.

    Raises
    ------
    DataError
        The file is no picture.
    """
    assert target.mask_path is not None
    try:
        with Image.open(target.mask_path) as image:
            values = np.asarray(image.convert("L") if image.mode not in ("1", "L", "P", "I;16", "I") else image)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError("A mask file is not a readable picture; copy the annotations again.") from error
    return np.asarray(values != 0 if target.mask_value is None else values == target.mask_value)


def has_sound_mask(target: Target, width_px: int, height_px: int, problems: Problems) -> bool:
    """Is the mask there, of its film's size, and not empty? If not, that is counted."""
    if target.mask_path is None or not target.mask_path.is_file():
        problems.add("missing mask")
        return False
    mask = read_mask(target)
    if mask.shape != (height_px, width_px):
        problems.add("mask of another size than its image")
    elif not mask.any():
        problems.add("empty mask")
    else:
        return True
    return False


def square_target(film: Film, target: Target, side_px: int) -> NDArray[np.bool_]:
    """[side_px, side_px] the target over the model's square (the film padded to a square, centred)."""
    if target.boxes:
        mask = np.zeros((film.height_px, film.width_px), dtype=bool)
        for box in target.boxes:
            mask[round(box.y0) : max(round(box.y1), round(box.y0) + 1), round(box.x0) : max(round(box.x1), round(box.x0) + 1)] = True
    else:
        mask = read_mask(target)
    square: NDArray[np.bool_] = square_masks(mask[None], side_px)[0]
    return square


def anatomy_order(groups: Sequence[str]) -> list[str]:
    """Nodes in graph order, then the rest by name."""
    return sorted(groups, key=lambda group: (NODE_INDEX.get(group, len(NODES)), group))
