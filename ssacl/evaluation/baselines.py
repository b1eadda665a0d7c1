"""What knows nothing of the picture: constant findings chosen on validation, and constant or random reports from training.

Every score of a model stands beside these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssacl.anatomy import FINDING_INDEX, FINDINGS, NO_FINDING, FindingStatus
from ssacl.data.labeler import Uncertain
from ssacl.errors import DataError
from ssacl.evaluation.text import tokenise
from ssacl.scores.clinical import ClinicalScores, Positives, clinical_f1, positives, report_status


def prior_findings(validation_status: ArrayLike, uncertain: Uncertain) -> dict[str, NDArray[np.bool_]]:
    """Constant predictions [14] of a head that knows prevalences only.

    `prior_all`: every finding that validation shows, which is the best constant per finding by F1 and so has the best macro-F1.
    `prior_frequent`: the most frequent findings, as many as give the best micro-F1 over the 14 on validation.

    Raises
    ------
    DataError
        There is no validation case; or see `positives`.
    """
    positive, counted = positives(validation_status, uncertain)
    if not len(positive):
        raise DataError("There is no validation case to take prevalences from.")
    real, kept = (positive & counted).sum(axis=0), counted.sum(axis=0)
    order = np.argsort(-real / np.maximum(kept, 1), kind="stable")
    # The first k of the order: 2 hits / (stated + real).
    f1 = 2 * np.cumsum(real[order]) / np.maximum(np.cumsum(kept[order]) + real.sum(), 1)
    frequent = np.zeros(len(FINDINGS), dtype=bool)
    frequent[order[: int(np.argmax(f1)) + 1]] = True
    return {"prior_all": real > 0, "prior_frequent": frequent}


def prior_scores(validation_status: ArrayLike, status: ArrayLike, uncertain: Uncertain) -> dict[str, ClinicalScores]:
    """`clinical_f1` of every constant of `prior_findings` on the cases of `status` [n, 14]."""
    num_cases = len(np.asarray(status))
    constants = prior_findings(validation_status, uncertain)
    repeated: Mapping[str, Positives] = {name: np.tile(each, (num_cases, 1)) for name, each in constants.items()}
    return {name: clinical_f1(predicted, status, uncertain) for name, predicted in repeated.items()}


def baseline_reports(training_reports: Sequence[str], num_cases: int, seed: int = 0) -> dict[str, list[str]]:
    """Reports for `num_cases` cases by systems that never look.

    `majority`: the most frequent training text, ties broken by order (where every text is unique: the first).
    `normal_medoid`: of the training reports that state "No Finding" (of all, if none does), the one whose words and word pairs are
    nearest (mean cosine) to all the others'.
    `random_report`: the report of a random training study for each case: findings come at their true rate, for the wrong patients.

    Raises
    ------
    DataError
        There is no training report.
    """
    texts = [text for text in training_reports if text.strip()]
    if not texts:
        raise DataError("There is no training report to take baselines from.")
    drawn = np.random.default_rng(seed).integers(len(texts), size=num_cases)
    return {
        "majority": [Counter(texts).most_common(1)[0][0]] * num_cases,
        "normal_medoid": [_medoid(_normal_reports(texts))] * num_cases,
        "random_report": [texts[index] for index in drawn],
    }


def _normal_reports(texts: Sequence[str]) -> list[str]:
    status = report_status(texts)[:, FINDING_INDEX[NO_FINDING]]
    normal = [text for text, each in zip(texts, status, strict=True) if each == FindingStatus.PRESENT]
    return normal or list(texts)


def _medoid(texts: Sequence[str]) -> str:
    vectors = [_unit_counts(text) for text in texts]
    # The mean cosine with all is the product with the sum of unit vectors.
    total: Counter[tuple[str, ...]] = Counter()
    for vector in vectors:
        total.update(vector)
    nearness = [sum(weight * total[term] for term, weight in vector.items()) for vector in vectors]
    return texts[int(np.argmax(nearness))]


def _unit_counts(text: str) -> dict[tuple[str, ...], float]:
    words = tokenise(text)
    counts: Counter[tuple[str, ...]] = Counter([(word,) for word in words])
    counts.update(pairwise(words))
    length = sum(count**2 for count in counts.values()) ** 0.5
    return {term: count / length for term, count in counts.items()}
