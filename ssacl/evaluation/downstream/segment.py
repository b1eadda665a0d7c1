"""`ssacl finetune segment`: how good are a checkpoint's patch features for drawing masks? Dice of a small decoder on them.

Beside it stand, always, the same decoder on the raw pixels of the patches, and the average mask of the training films. Epochs and
thresholds are chosen on validation films; the test films are answered once.

Shape letters: n films, C structures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.errors import ConfigError
from ssacl.evaluation.cases import claim_folder
from ssacl.evaluation.downstream.areas import Figures, Intervals, patient_weights, percentiles, slug
from ssacl.evaluation.downstream.decoder import MaskNet, MaskStore, answers, scores_of, train_masks
from ssacl.evaluation.downstream.epochs import Schedule
from ssacl.evaluation.downstream.films import PRESENT, UNKNOWN, FilmReader, TaskFilm, label_table
from ssacl.evaluation.downstream.mask_layouts import MaskSet, read_masks
from ssacl.evaluation.downstream.mask_sheet import mask_sheet_png
from ssacl.evaluation.downstream.overlap import THRESHOLDS, best_threshold, dice_at_thresholds
from ssacl.evaluation.downstream.task_card import make_task_card, open_on, unseen_films, write_task_card
from ssacl.evaluation.figures import NUM_RESAMPLES
from ssacl.evaluation.film_scores import interval
from ssacl.evaluation.page import ShownCase
from ssacl.training.checkpoint import LoadedModel

MODES = ("frozen", "full")
MODEL, RAW, MEAN_MASK = "model", "raw_pixels", "mean_mask"
KEPT = "kept"


@dataclass(frozen=True)
class SegmentOptions:
    """What is segmented, and how it is learned."""

    mode: str = "frozen"
    """"frozen" features, or the encoder trained too: "full"."""
    structures: tuple[str, ...] = ()
    """Empty: all that are drawn."""
    schedule: Schedule = field(default_factory=Schedule)
    seed: int = 0
    leave_out_bad: bool = False
    trained_films: str = "refuse"
    trained_on: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"'{self.mode}' is no mode; choose one of: {', '.join(MODES)}.")


@dataclass(frozen=True)
class _System:
    """Dice [n, C] of the test films at the thresholds that validation chose."""

    test: NDArray[np.float64]
    chosen: dict[str, Any]


def segment(
    checkpoint_url: str | Path,
    data_folder: str | Path,
    out_folder: str | Path,
    options: SegmentOptions | None = None,
    *,
    device: str = "cpu",
    start: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Learn and test masks; writes the score card into `out_folder`, which a repeated run goes on in, epoch by epoch.

    Parameters
    ----------
    data_folder
        Films with masks in a layout of `mask_layouts`.
    start, progress
        Called with the number of films that the decoders will train on, and with the number done since the last call.

    Returns
    -------
    dict
        The card: `metrics` has `dice_mean` and `dice_STRUCTURE`, and `dice_where_drawn_STRUCTURE` of films that have it.

    Raises
    ------
    ConfigError, DataError
        See `read_masks`; DataError also when test films were trained on, or `out_folder` holds another run.
    CheckpointError, TrainingError, StorageError
        The checkpoint or the disk fails, or a loss is not finite.
    """
    options = options or SegmentOptions()
    loaded = open_on(checkpoint_url, device)
    masks = read_masks(data_folder, options.structures, options.seed, options.leave_out_bad)
    task, reader = masks.task, FilmReader()
    test, trained_films = unseen_films(loaded, task.splits["test"], reader.digest, "", options.trained_films, options.trained_on)
    data = task.describe() | {"num_cases": len(test), "structures": list(task.names)}
    settings = {"checkpoint": loaded.manifest["files"], "data": data, **asdict(options)}
    folder = claim_folder(out_folder, KEPT, settings)
    size = loaded.config.model.vision.image_size_px
    films: dict[str, Sequence[TaskFilm]] = {"train": task.splits["train"], "val": task.splits["val"], "test": test}
    store = MaskStore(lambda film: masks.masks(film, size))
    if start is not None:
        start(2 * len(films["train"]) * options.schedule.num_epochs)
    known = {name: label_table(own) != UNKNOWN for name, own in films.items()}
    systems: dict[str, _System] = {}
    for name, kind in ((MODEL, options.mode), (RAW, "raw")):
        net = MaskNet(loaded.model, kind, len(task.names), options.seed).to(loaded.model.tau.device)
        state = folder / KEPT / f"{kind}.pt"
        fit = train_masks(net, reader, store, films, known, size, options.schedule, options.seed, state, progress)
        val, scored = (scores_of(net, reader, store, films[split], size) for split in ("val", "test"))
        chosen = {"best_epoch": fit.best_epoch, "val_dice_by_epoch": list(fit.val_figures)}
        systems[name] = _at_best(val, scored, known["val"], chosen, task.names)
        if name == MODEL:
            model_net = net
    systems[MEAN_MASK] = _mean_mask(store, films, known, task.names)
    shown = _shown(model_net, reader, store, systems[MODEL], test, known["test"], size)
    card = _card(loaded, data, options, trained_films, masks, test, systems, size)
    card |= {"shown": {"ranked_by": "film's own mean Dice", "ids": [case.id for case in shown]}}
    write_task_card(card, folder, shown)
    return card


def _at_best(
    val: NDArray[np.float64], test: NDArray[np.float64], known: NDArray[np.bool_], chosen: dict[str, Any], names: Sequence[str]
) -> _System:
    """Test scores [thresholds, n, C] at the thresholds that are best on validation."""
    best = best_threshold(val, known)
    picked = np.stack([test[number, :, column] for column, number in enumerate(best)], axis=1)
    return _System(picked, chosen | {"threshold": {name: THRESHOLDS[number] for name, number in zip(names, best, strict=True)}})


def _mean_mask(
    store: MaskStore, films: Mapping[str, Sequence[TaskFilm]], known: Mapping[str, NDArray[np.bool_]], names: Sequence[str]
) -> _System:
    """The average mask of the training films, the same for every film."""
    total, count = np.zeros(store.masks(films["train"][:1]).shape[1:]), np.zeros(len(names))
    for film, there in zip(films["train"], known["train"], strict=True):
        total += store.masks([film])[0] * there[:, None, None]
        count += there
    mean = (total / np.maximum(count, 1)[:, None, None]).astype(np.float32)
    val, test = (
        np.concatenate([dice_at_thresholds(mean[None], store.masks([film])) for film in films[name]], 1) for name in ("val", "test")
    )
    return _at_best(val, test, known["val"], {}, names)


def _shown(
    net: MaskNet,
    reader: FilmReader,
    store: MaskStore,
    system: _System,
    test: Sequence[TaskFilm],
    known: NDArray[np.bool_],
    size: int,
) -> list[ShownCase]:
    """The best, the median and the worst film with both outlines."""
    own = np.where(known, system.test, 0).sum(1) / np.maximum(known.sum(1), 1)
    order = np.argsort(-own, kind="stable")
    cases = []
    for kind, place in (("best", 0), ("median", len(order) // 2), ("worst", len(order) - 1)):
        row = int(order[place])
        square, probability, truth = next(answers(net, reader, store, [test[row]], size))
        cut = np.array(list(system.chosen["threshold"].values()))[:, None, None]
        sheet = mask_sheet_png(square[0], probability[0] >= cut, truth[0])
        film_id = hashlib.sha256(test[row].id.encode()).hexdigest()[:16]
        cases.append(ShownCase(kind, film_id, f"Dice {own[row]:.3f} (orange)", "as drawn (blue)", sheet))
    return cases


def _card(
    loaded: LoadedModel,
    data: dict[str, Any],
    options: SegmentOptions,
    trained_films: dict[str, Any],
    masks: MaskSet,
    test: Sequence[TaskFilm],
    systems: dict[str, _System],
    size: int,
) -> dict[str, Any]:
    labels, patients, task = label_table(test), [film.patient for film in test], masks.task
    figures = {name: _figures(system.test, labels, patients, task.names, options.seed) for name, system in systems.items()}
    metrics, intervals = figures[MODEL]
    gains, drawn = _gains(systems[MODEL].test - systems[RAW].test, labels, patients, task.names, options.seed)
    metrics, intervals = metrics | gains, intervals | drawn
    rows = []
    for name in metrics:
        if name in figures[RAW][0] and "where_drawn" not in name:
            others = {system: value for system in (RAW, MEAN_MASK) if (value := figures[system][0][name]) is not None}
            best = max(others, key=lambda system: others[system], default=None)
            baseline = None if best is None else others[best]
            rows.append({"figure": name, "model": metrics[name], "baseline": baseline, "baseline_name": best and best.replace("_", " ")})
    settings = {
        "mode": f"{options.mode} encoder, convolutional decoder",
        "seed": options.seed,
        "training_films": trained_films,
        "schedule": asdict(options.schedule),
        "policies": {
            "scored_at_px": size,
            "empty": "Dice is 1 where nothing is drawn and nothing found, 0 where only one of them is empty",
            "baselines": "the same decoder on raw pixels of the patches; the average mask of the training films",
            "chosen_on": "validation films: epoch and threshold; the test films are answered once",
            "augmentation": "none",
            "intervals": f"95 % percentiles of {NUM_RESAMPLES} resamples of patients",
        },
        "in_short": task.in_short() | {"training films": trained_films["what"]},
    }
    details = {
        "films_in_test": {name: int((labels[:, column] == PRESENT).sum()) for column, name in enumerate(task.names)},
        "systems": {
            name: {"figures": figures[name][0], "intervals": figures[name][1], "chosen_on_val": system.chosen}
            for name, system in systems.items()
        },
    }
    return make_task_card("segment", loaded, data, settings, metrics, intervals, rows, details)


def _gains(
    difference: NDArray[np.float64], labels: NDArray[np.int8], patients: Sequence[str], names: Sequence[str], seed: int
) -> tuple[Figures, Intervals]:
    """`dice_gain_STRUCTURE`, and `dice_gain_mean` over structures as `dice_mean` is: few films of one count like many of another."""
    known = labels != UNKNOWN
    weights = np.concatenate([np.ones((1, len(patients))), patient_weights(patients, seed)])
    count_RC = weights @ known
    # The first row is the films as they are, the others are resamples; a resample may lack a structure.
    mean_RC = np.divide(weights @ np.where(known, difference, 0), count_RC, out=np.full(count_RC.shape, np.nan), where=count_RC > 0)
    there = known.any(0)
    columns = {f"dice_gain_{slug(name)}": mean_RC[:, column] for column, name in enumerate(names) if there[column]}
    columns = {"dice_gain_mean": mean_RC[:, there].mean(1)} | columns
    return {name: float(drawn[0]) for name, drawn in columns.items()}, {name: percentiles(drawn[1:]) for name, drawn in columns.items()}


def _figures(
    scores: NDArray[np.float64], labels: NDArray[np.int8], patients: Sequence[str], names: Sequence[str], seed: int
) -> tuple[Figures, Intervals]:
    """Mean Dice by structure, over films where it is known and over films where it is drawn; the mean over structures."""
    metrics: Figures = {"dice_mean": None}
    intervals: Intervals = {}
    for column, name in enumerate(names):
        for kind, counts in (("dice", labels[:, column] != UNKNOWN), ("dice_where_drawn", labels[:, column] == PRESENT)):
            own = scores[counts, column]
            metrics[f"{kind}_{slug(name)}"] = float(own.mean()) if len(own) else None
            kept = [patient for patient, there in zip(patients, counts, strict=True) if there]
            intervals[f"{kind}_{slug(name)}"] = interval(own, kept, seed)
    there = [value for name in names if (value := metrics[f"dice_{slug(name)}"]) is not None]
    metrics["dice_mean"] = float(np.mean(there)) if there else None
    return metrics, intervals
