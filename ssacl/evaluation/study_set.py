"""Evaluates a checkpoint on a split: findings, report text and, where there is truth, anatomy maps, each beside its baselines.

With `ssacl.evaluation.truth` the only place that opens the test split and the truth. Thresholds come with the checkpoint or are chosen on
validation cases; nothing is chosen on the split that is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import FINDING_INDEX, FindingStatus
from ssacl.data.labeler import Uncertain
from ssacl.data.loader import open_split
from ssacl.data.reports import training_text
from ssacl.data.shards import SampleEntry, ShardIndex, read_sample
from ssacl.data.storage import Storage, open_storage
from ssacl.errors import DataError
from ssacl.evaluation.baselines import baseline_reports, prior_scores
from ssacl.evaluation.cases import EvaluationFolder
from ssacl.evaluation.drafts import DraftFolder
from ssacl.evaluation.grounding import scores_with_baselines
from ssacl.evaluation.predictions import MAPS_ONLY, Predictions, Runner, SplitPredictor, Work, sample_digest, sample_status
from ssacl.evaluation.roc import finding_areas
from ssacl.evaluation.text import diversity, text_scores
from ssacl.evaluation.truth import load_truth, true_masks, true_status
from ssacl.inference.generator import GenerationOptions
from ssacl.phantom.truth import PhantomTruth
from ssacl.scores.clinical import LABELER, Positives, clinical_f1, head_f1, load_chexbert, positives, report_status

if TYPE_CHECKING:
    from ssacl.data.chexbert import CheXbert

CHUNK = 16
"""Cases generated together."""
MAX_VALIDATION_CASES = 2000
MAX_TRAINING_REPORTS = 5000
"""Baselines are taken from this many, evenly spread over the split."""
MAX_MAP_CASES = 200
"""Cases whose maps are scored, evenly spread: masks of all nodes take 1.6 MB each."""
_EFFUSION = FINDING_INDEX["Pleural Effusion"]


@dataclass(frozen=True)
class SplitEvaluation:
    """Scores of a checkpoint on a split, and what they depend on."""

    identity: dict[str, Any]
    """Data, split, checkpoint, policies and settings."""
    metrics: dict[str, Any]
    """`findings`, `findings_auc`, `reports`, `effusion` and, with truth, `maps`: a system's scores by its name, baselines among them."""
    predictions: Predictions = field(repr=False)
    folder: EvaluationFolder | None = field(default=None, repr=False)


def evaluate_split(
    checkpoint_url: str | Path,
    data_url: str | Path,
    split: str = "test",
    truth_folder: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
    *,
    options: GenerationOptions | None = None,
    runner: Runner | None = None,
    seed: int = 0,
    chexbert_folder: str | Path | None = None,
    out_folder: str | Path | None = None,
) -> SplitEvaluation:
    """Run a checkpoint over a split and score it.

    Parameters
    ----------
    checkpoint_url
        Model folder, or s3:// prefix of one.
    data_url
        Data set root with the splits train (baseline reports), val (priors, map thresholds) and `split`.
    truth_folder
        Truth of a phantom data set. With it, findings are scored against what is in the picture, and maps against masks; without it
        findings are scored against the labels, and maps are not scored.
    limit
        First cases of the split only.
    progress
        Called with the number of cases answered since the last call; `num_cases_to_answer` tells their total.
    options
        Report search; the defaults if none.
    runner
        Where the checkpoint runs; in this process if none.
    seed
        Of the random baselines.
    chexbert_folder
        Reads the findings of reports by the CheXbert in this folder too, beside our labeler; labels of samples stay ours.
    out_folder
        Keeps the drafts here and makes only those that are missing; nowhere if none.

    Raises
    ------
    SplitError
        `split` is not val or test of the data set.
    DataError
        A split is empty, a sample is damaged, there is nothing to score against, the truth belongs to other films, or `out_folder` holds
        another evaluation.
    CheckpointError, GenerationError, StorageError
        The model (or CheXbert) cannot be loaded or cannot write, or storage fails.
    """
    chexbert = load_chexbert(chexbert_folder)
    storage = open_storage(str(data_url))
    entries, validation_entries = _entries(storage, split, limit, with_truth=truth_folder is not None)
    truth = None if truth_folder is None else load_truth(truth_folder)
    runner = runner or SplitPredictor(str(checkpoint_url), str(data_url))
    described = runner.describe()
    uncertain: Uncertain = described["uncertain"]
    options = (options or GenerationOptions()).model_copy(update={"max_batch_size": CHUNK})
    work = _chunks(entries, options, truth is not None) + _chunks(validation_entries, options.model_copy(update=MAPS_ONLY), True)
    data_sha256 = ShardIndex.load(storage).digest
    data = {"sha256": data_sha256, "split": split, "num_cases": len(entries), "limit": limit}
    answers, folder = runner.run(work), None
    if out_folder is not None:
        depends = {"data": data, "checkpoint": described["checkpoint"], "generation": options.model_dump(), "maps": truth is not None}
        folder = EvaluationFolder(out_folder, depends)
        answers = DraftFolder(folder.path).run(runner, work)
    parts = []
    for part in answers:
        parts.append(part)
        if progress is not None:
            progress(len(part))
    answered = Predictions.join(parts)
    row = {key: index for index, key in enumerate(answered.keys)}
    cases = answered.take([row[entry.key] for entry in entries])
    validation = answered.take([row[entry.key] for entry in validation_entries]) if validation_entries else None

    metrics: dict[str, Any] = _findings(storage, cases, truth, uncertain, described["thresholds"])
    metrics |= _reports(storage, cases, truth, uncertain, described["sections"], seed, chexbert)
    if truth is not None and validation is not None:
        metrics["maps"] = _maps(cases, validation, truth, seed)
    identity = described | {
        "data": data,
        "num_without_report": sum(not text for text in cases.references),
        "num_without_labels": int((~cases.labelled).sum()),
        "findings_against": "labels" if truth is None else "truth",
        "labeler": LABELER,
        "chexbert": None if chexbert is None else chexbert.name,
        "generation": options.model_dump(),
        "seed": seed,
    }
    return SplitEvaluation(identity, metrics, cases, folder)


def num_cases_to_answer(data_url: str | Path, split: str, limit: int | None, with_truth: bool) -> int:
    """How many cases `evaluate_split` runs the checkpoint on, for a progress bar; see there for the errors."""
    return sum(len(each) for each in _entries(open_storage(str(data_url)), split, limit, with_truth))


def _entries(storage: Storage, split: str, limit: int | None, with_truth: bool) -> tuple[list[SampleEntry], list[SampleEntry]]:
    entries = open_split(storage, split, purpose="evaluation")[:limit]
    if not entries:
        raise DataError(f"A limit of {limit} leaves no case of the split '{split}'; give at least 1.")
    # Map thresholds are chosen on validation, so that val itself cannot be scored beside truth without this being circular.
    if not with_truth:
        return entries, []
    taken = {entry.key for entry in entries}
    spare = [entry for entry in open_split(storage, "val", purpose="evaluation") if entry.key not in taken]
    if not spare:
        raise DataError("No validation case is left to choose map thresholds on; evaluate the test split, or set a limit.")
    return entries, _spread(spare, MAX_MAP_CASES)


def _findings(
    storage: Storage,
    cases: Predictions,
    truth: PhantomTruth | None,
    uncertain: Uncertain,
    thresholds: dict[str, float],
) -> dict[str, Any]:
    """The head against truth (or labels), beside constants that know the prevalences of validation."""
    samples = _read(storage, _spread(open_split(storage, "val", purpose="evaluation"), MAX_VALIDATION_CASES))
    if truth is None:
        if not cases.labelled.any():
            raise DataError("No case of the split has labels or a report to score findings against.")
        labelled, prior = np.flatnonzero(cases.labelled), np.array([sample_status(sample) for sample in samples if sample.labels])
        probabilities, status = cases.probabilities[labelled], cases.status[labelled]
        if not len(prior):
            raise DataError("No validation case has labels, so that there is no prevalence for the baselines.")
    else:
        probabilities, status = cases.probabilities, true_status(truth, cases.digests)
        prior = true_status(truth, [sample_digest(sample) for sample in samples])
    head = head_f1(probabilities, thresholds, status, uncertain)
    priors = prior_scores(prior, status, uncertain)
    present = positives(status, uncertain)[0][:, _EFFUSION]
    return {
        "findings": {name: scores.to_json() for name, scores in {"head": head, **priors}.items()},
        "findings_auc": finding_areas(probabilities, status, uncertain),
        "effusion": {"head": _by_presence(probabilities[:, _EFFUSION], present)},
    }


def _reports(
    storage: Storage,
    cases: Predictions,
    truth: PhantomTruth | None,
    uncertain: Uncertain,
    sections: Any,
    seed: int,
    chexbert: CheXbert | None,
) -> dict[str, Any]:
    """Report text and the findings that it states, beside reports that never look."""
    kept = [index for index, text in enumerate(cases.references) if text]
    if not kept:
        return {}
    references = [cases.references[index] for index in kept]
    training = _read(storage, _spread(open_split(storage, "train", purpose="evaluation"), MAX_TRAINING_REPORTS))
    systems = {"model": [cases.reports[index] for index in kept]}
    systems |= baseline_reports([training_text(sample, sections) for sample in training], len(kept), seed)
    read = {name: report_status(texts) for name, texts in systems.items()}
    stated = {name: positives(status, uncertain) for name, status in read.items()}
    truths = {"reference_reports": report_status(references)}
    if truth is not None:
        truths["truth"] = true_status(truth, cases.digests)[kept]
    against = {what: _against(stated, status, uncertain) for what, status in truths.items()}
    if chexbert is not None:
        by_chexbert = {name: positives(report_status(texts, chexbert), uncertain) for name, texts in systems.items()}
        read_too = truths | {"reference_reports": report_status(references, chexbert)}
        against |= {f"{what}_by_chexbert": _against(by_chexbert, status, uncertain) for what, status in read_too.items()}
    effusion_true = positives(truths.get("truth", truths["reference_reports"]), uncertain)[0][:, _EFFUSION]
    return {
        "reports": {
            "text": {name: text_scores(texts, references) for name, texts in systems.items()},
            "findings_against": against,
            "diversity": {name: diversity(texts) for name, texts in (*systems.items(), ("references", references))},
            "effusion": {name: _by_presence(positive[:, _EFFUSION].astype(float), effusion_true) for name, (positive, _) in stated.items()},
            "distinct_findings": len(np.unique(read["model"] == FindingStatus.PRESENT, axis=0)),
        }
    }


def _against(stated: dict[str, tuple[Positives, Positives]], status: NDArray[np.int64], uncertain: Uncertain) -> dict[str, dict[str, Any]]:
    return {name: clinical_f1(positive, status, uncertain, counted).to_json() for name, (positive, counted) in stated.items()}


def _maps(cases: Predictions, validation: Predictions, truth: PhantomTruth, seed: int) -> dict[str, Any]:
    """Anatomy maps against masks; thresholds from validation cases."""
    scored, fitted = cases.take(_spread(range(len(cases)), MAX_MAP_CASES)), validation
    masks, fitted_masks = (true_masks(truth, each.digests) for each in (scored, fitted))
    # The maps of a draft are smooth already.
    scores = scores_with_baselines(scored.maps, masks, fitted.maps, fitted_masks, sigma_cells=0.0, seed=seed)
    return {name: each.to_json() for name, each in scores.items()}


def _by_presence(value: NDArray[np.float64], present: NDArray[np.bool_]) -> dict[str, Any]:
    """Mean of a value over cases with and without a finding."""
    with_it, without = value[present], value[~present]
    return {
        "num_with": len(with_it),
        "num_without": len(without),
        "mean_with": float(with_it.mean()) if len(with_it) else None,
        "mean_without": float(without.mean()) if len(without) else None,
    }


def _read(storage: Storage, entries: Sequence[SampleEntry]) -> list[Any]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda entry: read_sample(storage, entry), entries))


def _chunks(entries: Sequence[SampleEntry], options: GenerationOptions, with_maps: bool) -> list[Work]:
    return [Work(tuple(entries[start : start + CHUNK]), options, with_maps) for start in range(0, len(entries), CHUNK)]


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of `items`, evenly spread, in order."""
    if len(items) <= count:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, count).round().astype(int)]
