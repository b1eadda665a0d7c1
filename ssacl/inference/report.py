"""DraftReport: what inference returns, and its JSON form. A draft is preliminary and unverified, always."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

DISCLAIMER = "Preliminary, unverified draft produced by software for research. Not a medical device; not for diagnosis."


@dataclass(frozen=True)
class Box:
    """Pixel box in the original image: x right, y down, half-open [x0, x1) x [y0, y1)."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Finding:
    name: str
    probability: float
    threshold: float
    """Chosen on validation; the finding is present when probability >= threshold."""
    present: bool


@dataclass(frozen=True)
class Sentence:
    text: str
    anatomy: tuple[str, ...]
    """Anatomy nodes that the sentence speaks of (`ssacl.anatomy.NODES`); empty: the whole chest."""
    finding: str | None
    status: str
    """"present", "absent", "uncertain" or "unmentioned"."""
    confidence: float
    """Mean token probability of the language model, 0..1."""
    box: Box | None
    evidence: NDArray[np.float32] = field(repr=False)
    """[grid, grid] float32, non-negative, sums to 1, over the model's square input."""


@dataclass(frozen=True)
class PhraseEvidence:
    """Where a film shows what a phrase says."""

    phrase: str
    anatomy: tuple[str, ...]
    """Anatomy nodes that the phrase was understood to name."""
    finding: str | None
    confidence: float
    """0..1: is it there? Low for a finding that the model does not see, and for words that it does not know."""
    names_nothing: bool
    """The phrase names nothing that the model sees in this film; the map then means little."""
    reason: str
    """Why so, in words; empty otherwise."""
    box: Box | None
    map_frame: Box
    """Original pixels that the map covers, as in `DraftReport`."""
    evidence: NDArray[np.float32] = field(repr=False)
    """[grid, grid] float32, non-negative, sums to 1."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON tree; the map as nested lists rounded to 5 digits."""
        return {**asdict(self), "evidence": _rounded(self.evidence)}


@dataclass(frozen=True)
class DraftReport:
    """A draft report of one image, with evidence."""

    sentences: tuple[Sentence, ...]
    findings: tuple[Finding, ...]
    anatomy_groups: tuple[str, ...]
    anatomy_maps: NDArray[np.float32] = field(repr=False)
    """[32, grid, grid] float32: one map per node, `NODES` order, each sums to 1."""
    image_width_px: int
    image_height_px: int
    map_frame: Box
    """Original pixels that the maps' square covers: beyond the image where it was padded, inside where it was cropped."""
    image_ref: str
    """Content hash of the picture read (sha256 of the stored pixels, or of the PNG or JPEG file); never a file name or DICOM id."""
    model_version: str
    provenance: dict[str, Any] = field(default_factory=dict)
    status: str = "preliminary"
    disclaimer: str = DISCLAIMER

    @property
    def text(self) -> str:
        return " ".join(sentence.text for sentence in self.sentences)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON tree; maps as nested lists rounded to 5 digits."""
        tree = asdict(self)
        tree["text"] = self.text
        tree["anatomy_maps"] = _rounded(self.anatomy_maps)
        for sentence in tree["sentences"]:
            sentence["evidence"] = _rounded(sentence["evidence"])
        return tree


def _rounded(maps: NDArray[np.float32]) -> list[Any]:
    # As float64: the digits of a rounded float32 are those of its next neighbour, thrice as many.
    rounded: list[Any] = np.round(maps.astype(np.float64), 5).tolist()
    return rounded
