"""The phantom's truth, joined to cases by the pixel digest of the film, with masks in the model's square."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import FINDING_INDEX, FINDINGS, NO_FINDING, NODES, FindingStatus
from ssacl.data.transforms import fit_of
from ssacl.errors import DataError
from ssacl.phantom.study import StudyTruth
from ssacl.phantom.truth import PhantomTruth

MASK_SIDE_PX = 224
"""Side of the square in which masks are compared, whatever the model's input size."""
_NO_PATHOLOGY = ("Support Devices", NO_FINDING)


def load_truth(folder: str | Path) -> PhantomTruth:
    """The truth of a phantom data set; `folder` is `NAME_truth` or NAME.

    Raises
    ------
    DataError
        There is no complete truth there.
    """
    return PhantomTruth.load(folder)


def true_status(truth: PhantomTruth, digests: Sequence[str]) -> NDArray[np.int64]:
    """[n, 14] PRESENT or ABSENT: what is in the picture, hedged in the report or not.

    Raises
    ------
    DataError
        Some case has no truth: these are not the films that the truth was written with.
    """
    status = np.full((len(digests), len(FINDINGS)), int(FindingStatus.ABSENT), dtype=np.int64)
    for case, study in enumerate(studies_of(truth, digests)):
        names = {finding.name for finding in study.findings}
        if not names - set(_NO_PATHOLOGY):
            names.add(NO_FINDING)
        status[case, [FINDING_INDEX[name] for name in names]] = int(FindingStatus.PRESENT)
    return status


def true_masks(truth: PhantomTruth, digests: Sequence[str], side_px: int = MASK_SIDE_PX) -> NDArray[np.bool_]:
    """[n, 32, side_px, side_px] masks over the model's square; the padding is outside of every mask. See `true_status` for errors."""
    masks = np.zeros((len(digests), len(NODES), side_px, side_px), dtype=bool)
    for case, study in enumerate(studies_of(truth, digests)):
        masks[case] = square_masks(study.masks, side_px)
    return masks


def one_sided(truth: PhantomTruth, digest: str) -> dict[str, str]:
    """Finding -> "right" or "left", for the findings of a film that lie on one side only. See `true_status` for errors."""
    (study,) = studies_of(truth, [digest])
    sides: dict[str, set[str]] = {}
    for finding in study.findings:
        sides.setdefault(finding.name, set()).add(finding.side)
    return {name: next(iter(found)) for name, found in sides.items() if found in ({"right"}, {"left"})}


def studies_of(truth: PhantomTruth, digests: Sequence[str]) -> Iterator[StudyTruth]:
    """The truth of each case. See `true_status` for errors."""
    missing = sum(digest not in truth for digest in digests)
    if missing:
        raise DataError(f"{missing} of {len(digests)} cases have no truth there; give the truth that was written with these films.")
    return (truth[digest] for digest in digests)


def square_masks(masks: NDArray[np.bool_], side_px: int) -> NDArray[np.bool_]:
    """Masks [K, H, W] of a picture through the same fit as the model's input -> [K, side_px, side_px]; nearest pixel."""
    height, width = masks.shape[1:]
    fit = fit_of(width, height, side_px)
    centres = np.arange(side_px) + 0.5
    rows = np.floor((centres - fit.offset_y) / fit.scale_y).astype(np.int64)
    columns = np.floor((centres - fit.offset_x) / fit.scale_x).astype(np.int64)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
    taken = masks[:, rows.clip(0, height - 1)][:, :, columns.clip(0, width - 1)]
    square: NDArray[np.bool_] = taken & inside
    return square
