"""Clinical efficacy: are the right findings stated? Precision, recall and F1 from statuses, under a stated policy on uncertain ones.

Shape letters: n cases, F = 14 findings (`FINDINGS` order). Unmentioned counts as absent, as is usual for these scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssacl.anatomy import FINDING_INDEX, FINDINGS, NO_FINDING, FindingStatus
from ssacl.data.labeler import Uncertain, label_report
from ssacl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ssacl.data.chexbert import CheXbert

LABELER = "ssacl.data.labeler"
CHEXPERT_FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
GROUPS: dict[str, tuple[str, ...]] = {
    "14": FINDINGS,
    "13": tuple(name for name in FINDINGS if name != NO_FINDING),
    "5": CHEXPERT_FIVE,
}
"""All CheXpert findings; without "No Finding"; the five that CheXpert's competition scored."""

Positives = NDArray[np.bool_]
"""[n, F]."""


@dataclass(frozen=True)
class Score:
    """Precision, recall and F1 in 0..1; 0 where nothing is predicted, or nothing is true."""

    precision: float
    recall: float
    f1: float
    support: int
    """True positives there were to find."""


@dataclass(frozen=True)
class ClinicalScores:
    """Findings stated against findings true."""

    uncertain: Uncertain
    """What an uncertain status counted as; "ignore" leaves the finding of that case out."""
    num_cases: int
    micro: dict[str, Score]
    """By group of `GROUPS`: over all its findings and cases together."""
    macro: dict[str, Score]
    """Unweighted mean over the group's findings; one that no case has counts, with F1 0 (as scikit-learn with zero_division 0)."""
    example: dict[str, Score]
    """Mean over cases of their own scores; a case without any true or stated finding of the group scores 0."""
    findings: dict[str, Score]

    def to_json(self) -> dict[str, Any]:
        """Flat figures `f1_micro_14`, `recall_macro_5`, ... and a row per finding."""
        kinds = {"micro": self.micro, "macro": self.macro, "example": self.example}
        flat: dict[str, Any] = {"uncertain": self.uncertain, "num_cases": self.num_cases}
        for kind, groups in kinds.items():
            for group, score in groups.items():
                flat |= {f"{name}_{kind}_{group}": round(getattr(score, name), 6) for name in ("f1", "precision", "recall")}
        rows = {name: {key: round(value, 6) for key, value in vars(score).items()} for name, score in self.findings.items()}
        return flat | {"findings": rows}


def positives(status: ArrayLike, uncertain: Uncertain) -> tuple[Positives, Positives]:
    """Which findings are there, and which of them count at all.

    Parameters
    ----------
    status
        [n, 14] of `FindingStatus`.
    uncertain
        "present", "absent", or "ignore".

    Returns
    -------
    positive, counted
        [n, 14] bool each; all is counted unless `uncertain` is "ignore".

    Raises
    ------
    DataError
        Wrong shape, or a value that is no status.
    ConfigError
        Unknown policy.
    """
    array = np.asarray(status)
    if array.ndim != 2 or array.shape[1] != len(FINDINGS):
        raise DataError(f"Statuses have shape {array.shape}; expected [cases, {len(FINDINGS)} findings].")
    if not np.isin(array, [int(each) for each in FindingStatus]).all():
        raise DataError("Statuses hold values that are no FindingStatus (0 absent, 1 present, 2 uncertain, 3 unmentioned).")
    doubtful = array == FindingStatus.UNCERTAIN
    present = array == FindingStatus.PRESENT
    if uncertain == "present":
        return present | doubtful, np.ones_like(present)
    if uncertain in ("absent", "ignore"):
        return present, ~doubtful if uncertain == "ignore" else np.ones_like(present)
    raise ConfigError(f"'{uncertain}' is no policy for uncertain findings; choose present, absent or ignore.")


def clinical_f1(predicted: Positives, status: ArrayLike, uncertain: Uncertain, counted: Positives | None = None) -> ClinicalScores:
    """Score stated findings against true ones.

    Parameters
    ----------
    predicted
        [n, 14] bool.
    status
        [n, 14] of `FindingStatus`: the truth.
    uncertain
        Policy on uncertain findings of the truth.
    counted
        [n, 14] bool: leaves further pairs out, where False.

    Raises
    ------
    DataError
        Shapes differ, or there is no case.
    """
    truth, kept = positives(status, uncertain)
    if predicted.shape != truth.shape or predicted.dtype != np.bool_:
        raise DataError(f"Predicted findings are {predicted.dtype} of shape {predicted.shape}; expected bool {truth.shape}.")
    if len(truth) == 0:
        raise DataError("There is no case to score; check the split and the limit.")
    if counted is not None:
        kept = kept & counted
    return scores_of_counts(predicted & truth & kept, predicted & kept, truth & kept, uncertain)


def clinical_counts(stated: ArrayLike, real: ArrayLike, uncertain: Uncertain) -> tuple[Positives, Positives, Positives]:
    """Hits, stated and real findings [n, F] of statuses [n, F] on both sides; under "ignore", what either doubts is left out.

    See `positives` for the errors.
    """
    (predicted, predicted_kept), (truth, truth_kept) = positives(stated, uncertain), positives(real, uncertain)
    kept = predicted_kept & truth_kept
    return predicted & truth & kept, predicted & kept, truth & kept


def scores_of_counts(hit: Positives, stated: Positives, real: Positives, uncertain: Uncertain) -> ClinicalScores:
    """Scores of `clinical_counts`; there is at least one case."""
    columns = {group: [FINDING_INDEX[name] for name in names] for group, names in GROUPS.items()}
    per_finding = [_score(hit[:, index], stated[:, index], real[:, index]) for index in range(len(FINDINGS))]
    return ClinicalScores(
        uncertain=uncertain,
        num_cases=len(real),
        micro={group: _score(hit[:, index], stated[:, index], real[:, index]) for group, index in columns.items()},
        macro={group: _mean([per_finding[column] for column in index]) for group, index in columns.items()},
        example={
            group: _mean([_score(*row) for row in zip(hit[:, index], stated[:, index], real[:, index], strict=True)])
            for group, index in columns.items()
        },
        findings=dict(zip(FINDINGS, per_finding, strict=True)),
    )


def head_f1(probabilities: ArrayLike, thresholds: Mapping[str, float], status: ArrayLike, uncertain: Uncertain) -> ClinicalScores:
    """Score the findings head: present where probability >= the finding's threshold (0.5 where there is none).

    `probabilities` is [n, 14] in 0..1; see `clinical_f1` for the rest.

    Raises
    ------
    DataError
        Shapes differ, or probabilities are not numbers in 0..1.
    """
    array = np.asarray(probabilities, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(FINDINGS) or not ((array >= 0) & (array <= 1)).all():
        raise DataError(f"Probabilities of shape {array.shape} came; expected [cases, {len(FINDINGS)}] with values in 0..1.")
    return clinical_f1(array >= np.array([thresholds.get(name, 0.5) for name in FINDINGS]), status, uncertain)


def load_chexbert(folder: str | Path | None) -> CheXbert | None:
    """The CheXbert of a folder, or None; see `CheXbert.load` for the errors."""
    if folder is None:
        return None
    from ssacl.data.chexbert import CheXbert

    return CheXbert.load(folder)


def report_status(reports: Sequence[str], chexbert: CheXbert | None = None) -> NDArray[np.int64]:
    """[n, 14] `FindingStatus` of report texts, by our labeler (`LABELER`), or by CheXbert where one is given."""
    if chexbert is not None:
        return chexbert.status(reports)
    return np.array([label_report(text).labels for text in reports], dtype=np.int64).reshape(len(reports), len(FINDINGS))


def report_f1(predicted_reports: Sequence[str], truth: Sequence[str] | NDArray[np.int64], uncertain: Uncertain) -> ClinicalScores:
    """Score the findings that reports state, read by our labeler.

    Parameters
    ----------
    predicted_reports
        One report per case.
    truth
        Reference reports, read by the same labeler; or [n, 14] `FindingStatus`.
    uncertain
        Policy for both sides; "ignore" leaves out what either side doubts.

    Raises
    ------
    DataError
        The lengths differ, or there is no case.
    """
    if len(predicted_reports) != len(truth):
        raise DataError(f"{len(predicted_reports)} reports and {len(truth)} truths; each report needs its own.")
    status = truth if isinstance(truth, np.ndarray) else report_status(truth)
    stated, counted = positives(report_status(predicted_reports), uncertain)
    return clinical_f1(stated, status, uncertain, counted)


def _score(hit: NDArray[np.bool_], stated: NDArray[np.bool_], real: NDArray[np.bool_]) -> Score:
    num_hit, num_stated, num_real = int(hit.sum()), int(stated.sum()), int(real.sum())
    return Score(
        precision=num_hit / num_stated if num_stated else 0.0,
        recall=num_hit / num_real if num_real else 0.0,
        f1=2 * num_hit / (num_stated + num_real) if num_stated + num_real else 0.0,
        support=num_real,
    )


def _mean(scores: Sequence[Score]) -> Score:
    precision, recall, f1 = (float(np.mean([getattr(score, name) for score in scores])) for name in ("precision", "recall", "f1"))
    return Score(precision, recall, f1, sum(score.support for score in scores))
