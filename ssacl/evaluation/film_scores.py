"""Figures of maps against masks and of points against landmarks, case by case, with intervals over patients.

Shape letters: n cases, S mask side, g map side, L landmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.evaluation.film_baselines import Folds, fit_rows
from ssacl.evaluation.grounding import CUTS
from ssacl.evaluation.phrases import contrast
from ssacl.scores.map_measures import Measured, Threshold, iou_at, measure

IOU_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of a map's maximum at which it is cut for `mean_iou`, as in the MS-CXR protocol (BioViL, arXiv 2204.09817)."""
PER_CASE = ("pointing", "iou", "mean_iou", "iou_best", "cnr", "cnr_signed", "average_precision", "centroid_error")
"""Figures that are means over cases."""
_RESAMPLES = 1000


@dataclass(frozen=True)
class GroupScores:
    """One system on one group of targets."""

    means: dict[str, float | None]
    """`PER_CASE`, `iou_at_0.1` .. `iou_at_0.5`, `correlation_x`, `correlation_y`."""
    intervals: dict[str, list[float]]
    """95 % bootstrap intervals over patients of the means of `PER_CASE`."""
    cases: dict[str, NDArray[np.float64]] = field(repr=False)
    """[n] of `PER_CASE`."""


def score_maps(
    maps: NDArray[np.float32], masks: NDArray[np.bool_], folds: Folds, patients: Sequence[str], *, never_moves: bool = False, seed: int = 0
) -> GroupScores:
    """Score [n, g, g] maps against [n, S, S] masks, each with pixels.

    Parameters
    ----------
    folds
        `iou` cuts a case's map where it is best on average for the other folds; `iou_best` where it is best for the case itself, which
        no system can know.
    never_moves
        The map is the same for every film (but for folds), so that its centroid correlates with nothing.
    """
    measured = measure(maps[:, None], masks[:, None], 0.0)
    ious = np.stack([iou_at(measured, 0, cut) for cut in CUTS], axis=1)
    fixed = {level: iou_at(measured, 0, Threshold("relative", level)) for level in IOU_LEVELS}
    signed = np.array([contrast(each, mask) for each, mask in zip(maps, masks, strict=True)])
    found, truth = measured.map_centroid[:, 0], measured.mask_centroid[:, 0]
    cases = {
        "pointing": measured.hit[:, 0].astype(np.float64),
        "iou": _cut_elsewhere(ious, folds),
        "mean_iou": np.mean(list(fixed.values()), axis=0),
        "iou_best": ious.max(axis=1),
        "cnr": np.abs(signed),
        "cnr_signed": signed,
        "average_precision": average_precision(measured, 0),
        "centroid_error": np.linalg.norm(found - truth, axis=1),
    }
    means: dict[str, float | None] = {name: mean_of(values) for name, values in cases.items()}
    means |= {f"iou_at_{level}": mean_of(values) for level, values in fixed.items()}
    for axis, name in enumerate(("correlation_x", "correlation_y")):
        means[name] = 0.0 if never_moves else correlation(found[:, axis], truth[:, axis])
    return GroupScores(means, {name: interval(values, patients, seed) for name, values in cases.items()}, cases)


def average_precision(measured: Measured, column: int) -> NDArray[np.float64]:
    """[n] area under precision and recall of a mask's pixels, ranked by the map in 256 levels: sum of (recall gained) x precision."""
    kept, inside = measured.kept[:, column, ::-1].astype(np.float64), measured.kept_in_mask[:, column, ::-1].astype(np.float64)
    recall = inside / np.maximum(measured.area[:, column], 1)[:, None]
    gained = np.diff(recall, axis=1, prepend=0.0)
    return np.asarray((gained * inside / np.maximum(kept, 1)).sum(axis=1))


def landmark_errors(points: NDArray[np.float64], truth: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, L] distances in half-widths; not a number where the landmark is not on the film."""
    return np.asarray(np.linalg.norm(points - truth, axis=2))


def correlation(found: NDArray[np.float64], truth: NDArray[np.float64]) -> float | None:
    """Pearson's; None under 3 cases or where the truth does not vary, 0 where what was found does not."""
    if len(found) < 3 or truth.std() < 1e-6:
        return None
    return 0.0 if found.std() < 1e-6 else float(np.corrcoef(found, truth)[0, 1])


def mean_of(values: NDArray[np.float64]) -> float | None:
    """Mean without not-a-numbers; None where there is nothing else."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if there.size else None


def interval(values: NDArray[np.float64], patients: Sequence[str], seed: int = 0) -> list[float]:
    """95 % bootstrap interval of the mean, patients drawn whole; empty under 5 patients. `values` may be [n] or [n, L]."""
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 5:
        return []
    there = np.isfinite(values).reshape(len(values), -1)
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    np.add.at(sums, owner, np.where(there, values.reshape(len(values), -1), 0.0).sum(1))
    np.add.at(counts, owner, there.sum(1))
    drawn = np.random.default_rng(seed).integers(len(names), size=(_RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / np.maximum(counts[drawn].sum(1), 1)
    return [round(float(edge), 4) for edge in np.quantile(means, (0.025, 0.975))]


def rounded(tree: Any) -> Any:
    """The tree with floats of 4 decimals; not-a-numbers become None."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    if isinstance(tree, float | np.floating):
        return round(float(tree), 4) if np.isfinite(tree) else None
    return tree


def _cut_elsewhere(ious: NDArray[np.float64], folds: Folds) -> NDArray[np.float64]:
    """[n] of [n, cuts]: each fold at the cut that is best on average for the others; not a number where there are none."""
    chosen = np.full(len(ious), np.nan)
    for fold in np.unique(folds):
        rows, own = fit_rows(folds, fold), folds == fold
        if len(rows):
            chosen[own] = ious[own, int(ious[rows].mean(axis=0).argmax())]
    return chosen
