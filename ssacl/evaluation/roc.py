"""Area under the ROC curve: how well a probability ranks films with a finding above films without it, at no threshold.

Shape letters: n cases, F = 14 findings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from ssacl.anatomy import FINDINGS
from ssacl.data.labeler import Uncertain
from ssacl.errors import DataError
from ssacl.scores.clinical import GROUPS, positives


def roc_auc(scores: ArrayLike, truth: ArrayLike) -> float | None:
    """The area, 0..1; ties count half. None where all cases or none are positive.

    Parameters
    ----------
    scores
        [n], any scale; higher means more likely.
    truth
        [n] bool.

    Raises
    ------
    DataError
        The lengths differ, or scores are not finite.
    """
    values, positive = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    if values.ndim != 1 or values.shape != positive.shape or not np.isfinite(values).all():
        raise DataError(f"Scores of shape {values.shape} for {positive.shape} cases; expected one finite number per case.")
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if not num_positive or not num_negative:
        return None
    # The rank sum of the positives counts the pairs that are ranked rightly (Mann and Whitney).
    ranked: NDArray[np.float64] = rankdata(values)
    return float((ranked[positive].sum() - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def finding_areas(probabilities: NDArray[np.float64], status: ArrayLike, uncertain: Uncertain) -> dict[str, float | None]:
    """Area of each finding of [n, F] probabilities against [n, F] `FindingStatus`; what "ignore" leaves out is left out."""
    truth, counted = positives(status, uncertain)
    return {
        name: roc_auc(probabilities[counted[:, column], column], truth[counted[:, column], column]) for column, name in enumerate(FINDINGS)
    }


def mean_area(areas: dict[str, float | None], group: str) -> float | None:
    """Mean over the findings of a group of `GROUPS` that have an area."""
    known = [area for name in GROUPS[group] if (area := areas[name]) is not None]
    return float(np.mean(known)) if known else None
