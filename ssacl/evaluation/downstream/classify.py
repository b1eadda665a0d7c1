"""`ssacl finetune classify`: how good are a checkpoint's features for telling findings, with 1, 10 or 100 % of the labels?

Beside it stands, always, logistic regression on the raw pixels of the same films, fitted and chosen in the same way. Patients are split;
penalties and epochs are chosen on validation films; the test films are answered once per label share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.errors import ConfigError
from ssacl.evaluation.cases import claim_folder
from ssacl.evaluation.downstream.areas import Figures, Intervals, area_figures
from ssacl.evaluation.downstream.epochs import Schedule
from ssacl.evaluation.downstream.features import RAW_PX, Features, frozen_features
from ssacl.evaluation.downstream.films import PRESENT, FilmReader, TaskFilm, TaskSet, label_table
from ssacl.evaluation.downstream.full import train_full
from ssacl.evaluation.downstream.label_layouts import LabelOptions, read_labels
from ssacl.evaluation.downstream.probe import PENALTIES, Probe, fit_probe
from ssacl.evaluation.downstream.splits import label_subset
from ssacl.evaluation.downstream.task_card import make_task_card, open_on, unseen_films, write_task_card
from ssacl.evaluation.figures import NUM_RESAMPLES
from ssacl.training.checkpoint import LoadedModel

MODES = ("linear", "full")
BASELINE = "raw_pixels"
KEPT = "kept"


@dataclass(frozen=True)
class ClassifyOptions:
    """How the task is learned."""

    mode: str = "linear"
    """"linear": logistic regression on frozen features; "full": the encoder is trained."""
    percents: tuple[float, ...] = (100.0,)
    """Shares of the training patients whose labels are used."""
    schedule: Schedule = field(default_factory=Schedule)
    """Of the full mode."""
    seed: int = 0
    trained_films: str = "refuse"
    trained_on: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES or not self.percents:
            raise ConfigError(f"Modes are {' and '.join(MODES)}, and at least one share of labels is needed (--labels 1,10,100).")


def classify(
    checkpoint_url: str | Path,
    data_url: str | Path,
    out_folder: str | Path,
    labels: LabelOptions | None = None,
    options: ClassifyOptions | None = None,
    *,
    device: str = "cpu",
    start: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Learn and test the findings of a set; writes the score card into `out_folder`, which a repeated run goes on in.

    Parameters
    ----------
    data_url
        A folder in a layout of `label_layouts`, or an ingested data set.
    start, progress
        Called with the number of films to be read, and with the number read since the last call.

    Returns
    -------
    dict
        The card: `metrics` of the largest label share (`auc_mean`, `auc_FINDING`, with `_N` behind for N % of the labels).

    Raises
    ------
    ConfigError, DataError, SplitError
        See `read_labels` and `label_subset`; DataError also when test films were trained on, or `out_folder` holds another run.
    CheckpointError, TrainingError, ImageError, StorageError
        The checkpoint, a film or the disk fails.
    """
    labels, options = labels or LabelOptions(), options or ClassifyOptions()
    loaded = open_on(checkpoint_url, device)
    task = read_labels(data_url, labels)
    reader = FilmReader(task.storage)
    test, trained_films = unseen_films(loaded, task.splits["test"], reader.digest, task.sha256, options.trained_films, options.trained_on)
    subsets = {percent: label_subset(task.splits["train"], percent, options.seed) for percent in sorted(set(options.percents))}
    data = task.describe() | {"num_cases": len(test), "findings": list(task.names), "only": list(labels.only)}
    settings = {"checkpoint": loaded.manifest["files"], "data": data, **asdict(options), "uncertain": labels.uncertain}
    folder = claim_folder(out_folder, KEPT, settings)

    everything = {"train": task.splits["train"], "val": task.splits["val"], "test": test}
    if start is not None:
        trained_on = sum(len(films) for films in subsets.values()) * options.schedule.num_epochs
        start(sum(len(films) for films in everything.values()) + (trained_on if options.mode == "full" else 0))
    features = {
        name: frozen_features(loaded.model, loaded.model_version, reader, films, folder / KEPT, progress)
        for name, films in everything.items()
    }
    results = {
        percent: _learned(loaded, reader, everything, subset, percent, features, task, options, folder / KEPT, progress)
        for percent, subset in subsets.items()
    }
    card = _card(loaded, data, settings, trained_films, task, test, subsets, results, labels, options)
    write_task_card(card, folder)
    return card


@dataclass(frozen=True)
class _Result:
    """Logits [n, F] of the test films by system, and what was chosen on validation."""

    systems: dict[str, NDArray[np.float64]]
    chosen: dict[str, Any]


def _learned(
    loaded: LoadedModel,
    reader: FilmReader,
    films: Mapping[str, Sequence[TaskFilm]],
    subset: Sequence[TaskFilm],
    percent: float,
    features: dict[str, Features],
    task: TaskSet,
    options: ClassifyOptions,
    kept_in: Path,
    progress: Callable[[int], None] | None,
) -> _Result:
    """One label share, by the model and by the baseline."""
    ids = {film.id for film in subset}
    rows = [row for row, film in enumerate(films["train"]) if film.id in ids]
    truth, val = label_table(subset), label_table(films["val"])

    def probe(which: str) -> Probe:
        train, choose, test = (getattr(features[name], which) for name in ("train", "val", "test"))
        return fit_probe((train[rows], truth), (choose, val), test, task.names)

    raw = probe("raw")
    chosen: dict[str, Any] = {BASELINE: {"penalty": raw.chosen, "val_auc": raw.val_areas}}
    if options.mode == "linear":
        fitted = probe("encoded")
        chosen["model"] = {"penalty": fitted.chosen, "val_auc": fitted.val_areas}
        return _Result({"model": fitted.test, BASELINE: raw.test}, chosen)
    state = kept_in / f"full_{percent:g}.pt"
    augmentation = loaded.config.data.augment
    trained = train_full(loaded.model, reader, {**films, "train": subset}, options.schedule, augmentation, options.seed, state, progress)
    chosen["model"] = {"best_epoch": trained.fit.best_epoch, "val_auc_by_epoch": list(trained.fit.val_figures)}
    return _Result({"model": trained.test, BASELINE: raw.test}, chosen)


def _card(
    loaded: LoadedModel,
    data: dict[str, Any],
    settings: dict[str, Any],
    trained_films: dict[str, Any],
    task: TaskSet,
    test: Sequence[TaskFilm],
    subsets: Mapping[float, Sequence[TaskFilm]],
    results: dict[float, _Result],
    labels: LabelOptions,
    options: ClassifyOptions,
) -> dict[str, Any]:
    truth, patients = label_table(test), [film.patient for film in test]
    metrics: Figures = {}
    intervals: Intervals = {}
    rows, by_percent = [], {}
    for percent in sorted(results, reverse=True):
        points, drawn = area_figures(results[percent].systems, truth, task.names, patients, options.seed)
        suffix = f"_{percent:g}"
        for name in sorted(points["model"], key=lambda each: each != "auc_mean"):
            gain = name.replace("auc_", "auc_gain_", 1)
            metrics |= {f"{name}{suffix}": points["model"][name], f"{gain}{suffix}": points["difference"][name]}
            intervals |= {f"{name}{suffix}": drawn["model"][name], f"{gain}{suffix}": drawn["difference"][name]}
            if len(task.names) > 1 or name != "auc_mean":
                rows.append(
                    {
                        "figure": f"{name}{suffix}",
                        "model": points["model"][name],
                        "baseline": points[BASELINE][name],
                        "baseline_name": "raw pixels",
                    }
                )
        by_percent[f"{percent:g}"] = {
            "train_films": len(subsets[percent]),
            "train_patients": len({film.patient for film in subsets[percent]}),
            "train_present": _present(subsets[percent], task),
            "systems": {name: {"figures": points[name], "intervals": drawn[name]} for name in points},
            "chosen_on_val": results[percent].chosen,
        }
    what = "logistic regression on frozen features" if options.mode == "linear" else "encoder trained, linear head"
    shown = {
        "mode": f"{options.mode} ({what})",
        "uncertain": labels.uncertain if task.layout == "ingested" else "none in this layout",
        "seed": options.seed,
        "training_films": trained_films,
        "schedule": asdict(options.schedule) if options.mode == "full" else None,
        "policies": {
            "baseline": f"logistic regression on {RAW_PX} x {RAW_PX} raw pixels of the same films",
            "penalties": list(PENALTIES),
            "chosen_on": "validation films; the test films are answered once per label share",
            "intervals": f"95 % percentiles of {NUM_RESAMPLES} resamples of patients",
        },
        "in_short": task.in_short() | {"training films": trained_films["what"]},
    }
    details = {"present_in_test": _present(test, task), "by_percent_of_labels": by_percent}
    return make_task_card("classify", loaded, data, shown, metrics, intervals, rows, details)


def _present(films: Sequence[TaskFilm], task: TaskSet) -> dict[str, int]:
    table = label_table(films)
    return {name: int((table[:, column] == PRESENT).sum()) for column, name in enumerate(task.names)}
