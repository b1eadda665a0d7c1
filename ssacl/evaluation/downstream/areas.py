"""Areas under the ROC curve of several systems on the same films, with bootstrap intervals over patients and paired differences.

Shape letters: n films, F findings, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ssacl.evaluation.downstream.films import PRESENT, UNKNOWN
from ssacl.evaluation.figures import LEVEL, NUM_RESAMPLES
from ssacl.evaluation.roc import roc_auc

_RESAMPLES_AT_ONCE = 50
_ENOUGH = 0.95
Figures = dict[str, float | None]
Intervals = dict[str, list[float] | None]


def patient_weights(patients: Sequence[str], seed: int, num_resamples: int = NUM_RESAMPLES) -> NDArray[np.float32]:
    """[R, n] how often each film is drawn when patients are drawn with replacement; the same seed draws the same patients."""
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = np.stack([np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names)) for _ in range(num_resamples)])
    weights: NDArray[np.float32] = drawn[:, owner].astype(np.float32)
    return weights


def resampled_areas(scores: NDArray[np.floating], truth: NDArray[np.bool_], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """[R] areas of [n] scores under [R, n] weights; ties count half, not a number where a resample has one class alone."""
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
    positive = truth[order]
    areas = np.empty(len(weights))
    for start in range(0, len(weights), _RESAMPLES_AT_ONCE):
        drawn = weights[start : start + _RESAMPLES_AT_ONCE, order].astype(np.float64)
        # Films of one score stand together.
        with_it = np.add.reduceat(drawn * positive, first, axis=1)
        without = np.add.reduceat(drawn * ~positive, first, axis=1)
        below = np.cumsum(without, axis=1) - without / 2
        pairs = with_it.sum(1) * without.sum(1)
        areas[start : start + len(drawn)] = np.divide((with_it * below).sum(1), pairs, out=np.full(len(drawn), np.nan), where=pairs > 0)
    return areas


def area_figures(
    systems: Mapping[str, NDArray[np.floating]],
    labels: NDArray[np.int8],
    names: Sequence[str],
    patients: Sequence[str],
    seed: int,
) -> tuple[dict[str, Figures], dict[str, Intervals]]:
    """Areas and intervals by system: `auc_FINDING` of each finding, `auc_mean` of those that have both classes.

    Parameters
    ----------
    systems
        [n, F] scores by name.
    labels
        [n, F] `PRESENT`, `ABSENT` or `UNKNOWN`; unknown films do not count for that finding.

    With exactly two systems there is a third, `difference`: the first less the second on the same resamples.
    """
    weights = patient_weights(patients, seed)
    points: dict[str, Figures] = {}
    resampled: dict[str, dict[str, NDArray[np.float64]]] = {}
    for system, scores in systems.items():
        points[system], resampled[system] = {}, {}
        for column, name in enumerate(names):
            known = labels[:, column] != UNKNOWN
            truth = labels[known, column] == PRESENT
            points[system][f"auc_{slug(name)}"] = area = roc_auc(scores[known, column], truth)
            if area is not None:
                resampled[system][f"auc_{slug(name)}"] = resampled_areas(scores[known, column], truth, weights[:, known])
        there = [area for area in points[system].values() if area is not None]
        points[system]["auc_mean"] = float(np.mean(there)) if there else None
        if there:
            # A resample may lack a rare finding.
            drawn_FR = np.stack(list(resampled[system].values()))
            count_R = np.isfinite(drawn_FR).sum(0)
            mean_R = np.divide(np.nansum(drawn_FR, axis=0), count_R, out=np.full(len(count_R), np.nan), where=count_R > 0)
            resampled[system]["auc_mean"] = mean_R
    if len(systems) == 2:
        (one, two), (drawn, other) = points.values(), resampled.values()
        points["difference"] = {name: None if (a := one[name]) is None or (b := two[name]) is None else a - b for name in one}
        resampled["difference"] = {name: drawn[name] - other[name] for name in drawn}
    return points, {
        system: {name: percentiles(drawn[name]) if name in drawn else None for name in points[system]}
        for system, drawn in resampled.items()
    }


def percentiles(resampled: NDArray[np.float64]) -> list[float] | None:
    """The bootstrap interval over the resamples in which a figure exists; None where it does not in more than a twentieth of them."""
    there = resampled[np.isfinite(resampled)]
    if len(there) < _ENOUGH * len(resampled):
        return None
    return [float(edge) for edge in np.quantile(there, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]


def slug(name: str) -> str:
    """`Pleural Effusion` and `Pleural_Effusion` -> `pleural_effusion`."""
    return name.lower().replace(" ", "_")
