"""Dice of masks, film by film, with intervals over patients.

Shape letters: n films, C structures, S mask side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Probabilities at which masks are cut; which one, validation films say."""


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[...] of masks [..., S, S]: twice the overlap over the sum of the areas; 1 where both are empty (as SIIM-ACR scores it)."""
    overlap = (found & truth).sum((-1, -2))
    areas = found.sum((-1, -2)) + truth.sum((-1, -2))
    scores: NDArray[np.float64] = np.divide(2.0 * overlap, areas, out=np.ones(np.shape(areas)), where=areas > 0)
    return scores


def dice_at_thresholds(probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[thresholds, n, C] of [n, C, S, S]."""
    return np.stack([dice(probability >= threshold, truth) for threshold in THRESHOLDS])


def best_threshold(scores: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[C] number of the threshold with the best mean over known films [n, C]; the middle one where none is known."""
    chosen = np.full(known.shape[1], len(THRESHOLDS) // 2)
    for column in range(known.shape[1]):
        if known[:, column].any():
            chosen[column] = int(scores[:, known[:, column], column].mean(1).argmax())
    return chosen
