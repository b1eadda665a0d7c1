"""`ssacl evaluate retrieval`: does a film find its report, a report its film, and a finding's sentence films that show it?

R@K: the share of queries whose own partner is among the K nearest. Reports with the same words are one report: any of their films is right.
Ties are settled against the query, so that a model to which all is alike finds nothing.

P@K of a class, as on CheXpert 5x200: films that show exactly one of the classes, at most 200 of each, are ranked by their cosine with the
class's sentences; the share of the K nearest that show it.

Shape letters: n films with a report, c queries at once, R resamples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import FINDING_INDEX
from ssacl.data.reports import training_text
from ssacl.data.shards import read_sample
from ssacl.errors import ConfigError, DataError
from ssacl.evaluation.downstream.areas import Figures, Intervals, patient_weights, percentiles, slug
from ssacl.evaluation.downstream.contrast import Embedded
from ssacl.evaluation.downstream.contrast_run import ContrastOptions, ContrastRun, run_contrast
from ssacl.evaluation.downstream.films import PRESENT
from ssacl.evaluation.downstream.label_layouts import told_labels
from ssacl.evaluation.downstream.prompts import embed_prompts, load_prompts
from ssacl.evaluation.downstream.task_card import make_task_card, write_task_card
from ssacl.evaluation.figures import NUM_RESAMPLES
from ssacl.evaluation.film_scores import interval
from ssacl.evaluation.page import ShownCase
from ssacl.scores.clinical import CHEXPERT_FIVE

RECALL_AT = (1, 5, 10)
PRECISION_AT = (5, 10, 50)
PER_CLASS = 200
_QUERIES_AT_ONCE = 512


def ranks(queries: NDArray[np.float32], gallery: NDArray[np.float32], keys: NDArray[np.str_]) -> NDArray[np.int64]:
    """[n] how many of the [n, T] gallery stand before a query's own partner, which has its row; those of equal `keys` are partners too."""
    found = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        own = slice(start, start + _QUERIES_AT_ONCE)
        cosine_cn = queries[own] @ gallery.T
        partner_cn = keys[own, None] == keys[None]
        best_c = np.where(partner_cn, cosine_cn, -np.inf).max(1)
        found[own] = (~partner_cn & (cosine_cn >= best_c[:, None])).sum(1)
    return found


def chance(keys: NDArray[np.str_], k: int) -> float:
    """R@k of an order drawn at random."""
    _, owner, count = np.unique(keys, return_inverse=True, return_counts=True)
    total = len(keys)
    missed = [math.comb(total - int(partners), k) / math.comb(total, k) if k <= total else 0.0 for partners in count]
    return float(1 - np.asarray(missed)[owner].mean())


@dataclass(frozen=True)
class ClassQuery:
    """Films ranked for one class."""

    name: str
    scores: NDArray[np.float32]
    """[candidates]."""
    right: NDArray[np.bool_]


def precision_at(query: ClassQuery, k: int, weights: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
    """[R] share of right films among the k nearest; films weigh as often as they are drawn ([R, candidates]; once each if none).

    Ties are settled against the class.
    """
    order = np.lexsort((query.right, -query.scores))
    drawn = np.ones((1, len(order))) if weights is None else weights[:, order].astype(np.float64)
    before = np.cumsum(drawn, axis=1) - drawn
    taken = np.clip(k - before, 0, drawn)
    share: NDArray[np.float64] = (taken * query.right[order]).sum(1) / np.maximum(taken.sum(1), 1)
    return share


def candidates(labels: NDArray[np.int8], keys: Sequence[str], per_class: int, seed: int) -> NDArray[np.int64]:
    """Rows of [n, classes] labels with exactly one class present, at most `per_class` of each, drawn by the seed."""
    alone = (labels == PRESENT).sum(1) == 1
    order = sorted(np.flatnonzero(alone).tolist(), key=lambda row: hashlib.sha256(f"{seed}|{keys[row]}".encode()).digest())
    kept = [[row for row in order if labels[row, column] == PRESENT][:per_class] for column in range(labels.shape[1])]
    return np.sort(np.array([row for rows in kept for row in rows], dtype=np.int64))


def retrieval(
    checkpoint_url: str | Path,
    data_url: str | Path,
    out_folder: str | Path,
    prompts_path: str | Path,
    options: ContrastOptions | None = None,
    *,
    per_class: int = PER_CLASS,
    start: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score retrieval on a split; writes the score card into `out_folder`, which a repeated run goes on in.

    Parameters
    ----------
    prompts_path
        Their present sentences are the class queries; see `load_prompts`.
    options
        `findings` are the classes; those of CheXpert 5x200 if none.
    per_class
        Films of a class at most.

    Returns
    -------
    dict
        The card: `metrics` has `image_to_text_r_1`, `text_to_image_r_1`, ..., `precision_5`, `precision_5_CLASS`, ...

    Raises
    ------
    ConfigError, DataError, SplitError, CheckpointError, GenerationError, StorageError
        See `zero_shot`; DataError also where fewer than two films have a report.
    """
    if per_class < 1:
        raise ConfigError(f"{per_class} films of a class are no gallery; give --per-class 1 or more.")
    prompts, options = load_prompts(prompts_path), options or ContrastOptions()
    classes = options.findings or CHEXPERT_FIVE
    own = {"task": "retrieval", "per_class": per_class}
    run = run_contrast(checkpoint_url, data_url, out_folder, prompts, replace(options, findings=classes), own, start, progress)
    embedded = run.embedded
    told = np.flatnonzero(embedded.num_tokens > 0)
    if len(told) < 2:
        raise DataError(f"{len(told)} films of the split '{options.split}' have a report; retrieval needs at least two.")
    metrics: Figures = {}
    intervals: Intervals = {}
    baselines: dict[str, float] = {}
    image, text, keys = embedded.image[told], embedded.text[told], embedded.text_key[told]
    patients = embedded.patient[told].tolist()
    found = {"image_to_text": ranks(image, text, keys), "text_to_image": ranks(text, image, keys)}
    for direction, rank in found.items():
        for k in RECALL_AT:
            hit = (rank < k).astype(np.float64)
            metrics[f"{direction}_r_{k}"] = float(hit.mean())
            intervals[f"{direction}_r_{k}"] = interval(hit, patients, options.seed)
            baselines[f"{direction}_r_{k}"] = chance(keys, k)
    gallery = _by_class(
        run, classes, embed_prompts(run.loaded, prompts.of(classes), "present"), per_class, options.seed, metrics, intervals, baselines
    )
    limit = run.loaded.config.data.text_max_tokens
    settings = run.settings | {
        "policies": {
            "partners": "reports with the same words are one report",
            "ties": "against the query",
            "reports cut": f"{int((embedded.num_tokens > limit).sum())} of {len(told)} have more than the {limit} tokens that are read",
            "intervals": f"95 % percentiles of {NUM_RESAMPLES} resamples of the queries' patients; the gallery stays as it is",
            "class_intervals": "resamples of the gallery's patients",
        },
        "gallery_of_classes": gallery,
        "in_short": {
            "films with report": len(told),
            "distinct reports": len(np.unique(keys)),
            "films of one class alone": sum(gallery.values()),
            "training films": run.settings["training_films"]["what"],
        },
    }
    shown = _shown(run, told, found["image_to_text"])
    settings |= {"shown": {"ranked_by": "place of the film's own report", "ids": [case.id for case in shown]}}
    rows = [{"figure": name, "model": metrics[name], "baseline": baselines[name], "baseline_name": "chance"} for name in metrics]
    details = {"median_rank": {direction: float(np.median(rank)) + 1 for direction, rank in found.items()}}
    card = make_task_card("retrieval", run.loaded, run.data | {"num_cases": len(told)}, settings, metrics, intervals, rows, details)
    write_task_card(card, run.folder, shown)
    return card


def _by_class(
    run: ContrastRun,
    classes: Sequence[str],
    queries: NDArray[np.float32],
    per_class: int,
    seed: int,
    metrics: Figures,
    intervals: Intervals,
    baselines: dict[str, float],
) -> dict[str, int]:
    """Add P@K of each class, and their means; the number of films by class. Without films of two classes there is nothing to rank."""
    embedded: Embedded = run.embedded
    labels = np.array([told_labels(status, run.settings["uncertain"]) for status in embedded.status], np.int8)
    labels = labels[:, [FINDING_INDEX[name] for name in classes]]
    rows = candidates(labels, [entry.key for entry in run.entries], per_class, seed)
    count = {name: int((labels[rows, column] == PRESENT).sum()) for column, name in enumerate(classes)}
    if sum(each > 0 for each in count.values()) < 2:
        return count
    weights = patient_weights(embedded.patient[rows].tolist(), seed)
    asked = [
        ClassQuery(name, embedded.image[rows] @ queries[column], labels[rows, column] == PRESENT)
        for column, name in enumerate(classes)
        if count[name]
    ]
    for k in PRECISION_AT:
        if k > len(rows):
            continue
        drawn = [precision_at(query, k, weights) for query in asked]
        metrics[f"precision_{k}"] = float(np.mean([precision_at(query, k)[0] for query in asked]))
        intervals[f"precision_{k}"] = percentiles(np.mean(drawn, axis=0))
        baselines[f"precision_{k}"] = float(np.mean([query.right.mean() for query in asked]))
        for query, each in zip(asked, drawn, strict=True):
            name = f"precision_{k}_{slug(query.name)}"
            metrics[name], intervals[name], baselines[name] = float(precision_at(query, k)[0]), percentiles(each), float(query.right.mean())
    return count


def _shown(run: ContrastRun, told: NDArray[np.int64], rank: NDArray[np.int64]) -> list[ShownCase]:
    """The best, the median and the worst film, with the report that it finds first beside its own."""
    order = np.argsort(rank, kind="stable")
    cases = []
    for kind, place in (("best", 0), ("median", len(order) // 2), ("worst", len(order) - 1)):
        row = told[order[place]]
        first = told[int((run.embedded.text[told] @ run.embedded.image[row]).argmax())]
        nearest, own = (read_sample(run.storage, run.entries[each]) for each in (first, row))
        sections = run.loaded.config.data.sections
        cases.append(ShownCase(kind, own.key, training_text(nearest, sections), training_text(own, sections)))
    return cases
