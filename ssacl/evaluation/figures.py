"""Figures of a report evaluation from sums over cases, so that intervals and paired tests only re-weigh the cases.

Shape letters: n cases, K columns, R resamples, F = 14 findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import FINDING_INDEX, FINDINGS
from ssacl.data.labeler import Uncertain
from ssacl.errors import DataError
from ssacl.evaluation.cases import Case
from ssacl.evaluation.text import MAX_ORDER, bleu_of
from ssacl.scores.clinical import GROUPS, ClinicalScores, clinical_counts, scores_of_counts

NUM_RESAMPLES = 1000
LEVEL = 0.95
_RESAMPLES_AT_ONCE = 50
_LABELERS = {"clinical": ("stated", "real"), "chexbert": ("chexbert_stated", "chexbert_real")}
_KINDS = ("f1", "precision", "recall")
LOWER_IS_BETTER = ("sides_wrong_share", "prior_share", "prior_unbacked_share", "empty_share", "truncated_share", "most_common_share")
NEITHER_IS_BETTER = ("mean_tokens", "mean_tokens_reference", "length_ratio", "sides_compared")

Columns = NDArray[np.float64]
"""[n, K]."""


@dataclass(frozen=True)
class Statistics:
    """What cases add to the figures; figures are functions of column sums."""

    values: Columns
    places: dict[str, slice]
    """Name -> its columns."""

    def figures(self, sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Figures [...] of column sums [..., K]; not a number where there is nothing to divide by."""
        get = {name: sums[..., place] for name, place in self.places.items()}
        one = {name: columns[..., 0] for name, columns in get.items()}
        num_cases, bleu = one["cases"], bleu_of(get["bleu"])
        found = {f"bleu_{order + 1}": bleu[..., order] for order in range(MAX_ORDER)}
        found |= {name: one[name] / num_cases for name in ("rouge_l", "cider_d")}
        for labeler in _LABELERS:
            if f"{labeler}_counts" in get:
                found |= _clinical(labeler, get[f"{labeler}_counts"], get[f"{labeler}_example"], num_cases)
        tokens, reference_tokens = get["bleu"][..., 0], get["bleu"][..., 1]
        found |= {
            "mean_tokens": tokens / num_cases,
            "mean_tokens_reference": reference_tokens / num_cases,
            "length_ratio": tokens / reference_tokens,
            "sides_compared": one["sides_compared"],
            "sides_wrong_share": _ratio(one["sides_wrong"], one["sides_compared"]),
        }
        return found | {f"{name}_share": one[name] / num_cases for name in ("prior", "prior_unbacked", "empty", "truncated")}


def statistics(cases: Sequence[Case], uncertain: Uncertain) -> Statistics:
    """Columns of cases under a policy on uncertain findings.

    Raises
    ------
    DataError
        There is no case.
    """
    if not cases:
        raise DataError("There is no case to score; check the split and the limit.")
    columns: dict[str, NDArray[Any]] = {
        "cases": np.ones(len(cases)),
        "bleu": np.array([case.bleu for case in cases]),
        **{name: np.array([getattr(case, name) for case in cases]) for name in ("rouge_l", "cider_d", "sides_compared", "sides_wrong")},
        **{name: np.array([getattr(case, name) for case in cases]) for name in ("prior", "empty", "truncated")},
        "prior_unbacked": np.array([case.prior and not case.reference_prior for case in cases]),
    }
    for labeler, (stated, real) in _LABELERS.items():
        if getattr(cases[0], stated):
            counts = clinical_counts(_statuses(cases, stated), _statuses(cases, real), uncertain)
            columns[f"{labeler}_counts"] = np.concatenate(counts, axis=1)
            columns[f"{labeler}_example"] = np.stack(
                [_prf(*(count[:, _index(group)].sum(1) for count in counts))[kind] for group in GROUPS for kind in range(3)], axis=1
            )
    places, start = {}, 0
    for name, values in columns.items():
        width = 1 if values.ndim == 1 else values.shape[1]
        places[name] = slice(start, start + width)
        start += width
    return Statistics(np.column_stack(list(columns.values())).astype(np.float64), places)


def point_figures(found: Statistics) -> dict[str, float | None]:
    """Figures of all cases; None where there is nothing to divide by."""
    return {name: _number(value) for name, value in found.figures(found.values.sum(axis=0)).items()}


def intervals(found: Statistics, seed: int, num_resamples: int = NUM_RESAMPLES) -> dict[str, tuple[float, float] | None]:
    """Bootstrap percentile intervals (`LEVEL`) over cases; None where a figure does not exist in every resample.

    CIDEr's document frequencies stay those of all references.
    """
    resampled = resampled_figures(found, seed, num_resamples)
    return {name: _interval(values) for name, values in resampled.items()}


def resampled_figures(found: Statistics, seed: int, num_resamples: int) -> dict[str, NDArray[np.float64]]:
    """Figures [R] of cases drawn with replacement; the same seed draws the same cases."""
    rng, num_cases = np.random.default_rng(seed), len(found.values)
    parts = []
    for start in range(0, num_resamples, _RESAMPLES_AT_ONCE):
        chosen = rng.integers(num_cases, size=(min(_RESAMPLES_AT_ONCE, num_resamples - start), num_cases))
        weights = np.stack([np.bincount(row, minlength=num_cases) for row in chosen]).astype(np.float64)
        parts.append(found.figures(weights @ found.values))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def clinical_details(cases: Sequence[Case], uncertain: Uncertain) -> dict[str, ClinicalScores]:
    """All clinical scores by labeler ("clinical": ours, "chexbert"), a row per finding among them."""
    return {
        labeler: scores_of_counts(*clinical_counts(_statuses(cases, stated), _statuses(cases, real), uncertain), uncertain)
        for labeler, (stated, real) in _LABELERS.items()
        if getattr(cases[0], stated)
    }


def case_quality(cases: Sequence[Case], uncertain: Uncertain) -> NDArray[np.float64]:
    """[n] by which cases are ranked for show: the mean of ROUGE-L and the case's own clinical F1 over 14 findings."""
    found = statistics(cases, uncertain)
    rouge, example = found.values[:, found.places["rouge_l"]][:, 0], found.values[:, found.places["clinical_example"]][:, 0]
    quality: NDArray[np.float64] = (rouge + example) / 2
    return quality


def _clinical(labeler: str, counts: NDArray[np.float64], example: NDArray[np.float64], num_cases: NDArray[np.float64]) -> dict[str, Any]:
    hit, stated, real = np.split(counts, 3, axis=-1)
    per_finding = _prf(hit, stated, real)
    found: dict[str, Any] = {}
    for number, group in enumerate(GROUPS):
        micro = _prf(*(each[..., _index(group)].sum(-1) for each in (hit, stated, real)))
        for kind, name in enumerate(_KINDS):
            found[f"{labeler}_{name}_micro_{group}"] = micro[kind]
            found[f"{labeler}_{name}_macro_{group}"] = per_finding[kind][..., _index(group)].mean(-1)
            found[f"{labeler}_{name}_example_{group}"] = example[..., 3 * number + kind] / num_cases
    for column, finding in enumerate(FINDINGS):
        for kind, name in enumerate(_KINDS):
            found[f"{labeler}_{name}_{finding.lower().replace(' ', '_')}"] = per_finding[kind][..., column]
    return found


def _prf(hit: NDArray[Any], stated: NDArray[Any], real: NDArray[Any]) -> tuple[NDArray[np.float64], ...]:
    """F1, precision, recall; 0 where there is nothing to divide by, as scikit-learn with zero_division 0."""
    return (
        2 * hit / np.maximum(stated + real, 1),
        hit / np.maximum(stated, 1),
        hit / np.maximum(real, 1),
    )


def _statuses(cases: Sequence[Case], name: str) -> NDArray[np.int64]:
    return np.array([getattr(case, name) for case in cases], dtype=np.int64)


def _index(group: str) -> list[int]:
    return [FINDING_INDEX[name] for name in GROUPS[group]]


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
    return ratio


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _interval(values: NDArray[np.float64]) -> tuple[float, float] | None:
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
