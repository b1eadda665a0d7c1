"""Logistic regression on fixed features: how frozen features and raw pixels are compared, both in exactly the same way.

Features are standardised by the training films. The strength of the penalty is chosen per finding by the area under the ROC curve on
validation films; nothing else is chosen.

Shape letters: n films, K features, F findings.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssacl.errors import DataError
from ssacl.evaluation.downstream.films import PRESENT, UNKNOWN
from ssacl.evaluation.roc import roc_auc

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""scikit-learn's C, strongest penalty first."""
_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """A fitted probe's answers."""

    test: NDArray[np.float64]
    """[n, F] logits of the test films; 0 throughout where a finding could not be fitted."""
    chosen: dict[str, float | None]
    """Penalty by finding; None where the training films have one class alone."""
    val_areas: dict[str, float | None]


def fit_probe(
    train: tuple[NDArray[np.float32], NDArray[np.int8]],
    val: tuple[NDArray[np.float32], NDArray[np.int8]],
    test: NDArray[np.float32],
    names: Sequence[str],
) -> Probe:
    """Fit on features [n, K] and labels [n, F] of training films, choose on validation, answer the test features once.

    Where validation has one class alone, the middle penalty is taken.

    Raises
    ------
    DataError
        Features are not finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if not all(np.isfinite(features).all() for features in (train[0], val[0], test)):
        raise DataError("Features are not finite numbers: the checkpoint's weights are damaged. Give another checkpoint.")
    mean, deviation = train[0].mean(0), np.maximum(train[0].std(0), 1e-6)
    fit_on, choose_on, answer = ((features - mean) / deviation for features in (train[0], val[0], test))
    logits = np.zeros((len(test), len(names)))
    chosen: dict[str, float | None] = {}
    areas: dict[str, float | None] = {}
    for column, name in enumerate(names):
        known, known_val = train[1][:, column] != UNKNOWN, val[1][:, column] != UNKNOWN
        truth, truth_val = train[1][known, column] == PRESENT, val[1][known_val, column] == PRESENT
        chosen[name] = areas[name] = None
        if truth.all() or not truth.any():
            continue
        candidates = []
        for penalty in PENALTIES:
            model = LogisticRegression(C=penalty, max_iter=_MAX_ITERATIONS)
            with warnings.catch_warnings():
                # A weak penalty on few films may not settle; validation decides all the same.
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(fit_on[known], truth)
            area = roc_auc(model.decision_function(choose_on[known_val]), truth_val)
            candidates.append((area, penalty, model))
        best = len(PENALTIES) // 2
        if candidates[0][0] is not None:
            best = max(range(len(candidates)), key=lambda place: candidates[place][0] or 0.0)
        areas[name], chosen[name], model = candidates[best]
        logits[:, column] = model.decision_function(answer)
    return Probe(logits, chosen, areas)
