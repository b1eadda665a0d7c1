"""What a checkpoint's features are worth on real films: Pneumonia against No Finding, and masks of lungs and mediastinum.

python -m benchmarks.downstream CHECKPOINT --work DIR [--save]

Films are split by patients (60/10/30, dealt by the seed; masks 70/10/20). Beside the frozen features stand logistic regression on raw
pixels (AUC), and the same decoder on raw patches and the average mask (Dice). Penalties, epochs and thresholds come from validation films.
The goal is that frozen features are better than raw pixels; a loss is a result too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_data import REAL, Row, real_data
from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.evaluation.downstream.classify import ClassifyOptions, classify
from ssacl.evaluation.downstream.epochs import Schedule
from ssacl.evaluation.downstream.films import TaskFilm
from ssacl.evaluation.downstream.label_layouts import LabelOptions
from ssacl.evaluation.downstream.segment import SegmentOptions, segment
from ssacl.evaluation.downstream.splits import split_patients
from ssacl.evaluation.film_scores import rounded
from ssacl.progress import ProgressBar

SHARES = {"train": 0.6, "val": 0.1, "test": 0.3}
FINDING, REST = "Pneumonia", "No Finding"
STRUCTURES = ("right lung", "left lung", "mediastinum")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="data set, features and states are kept here")
    parser.add_argument("--data", type=Path, default=REAL, metavar="DIR", help="the real folder")
    parser.add_argument("--trained-on", default="", metavar="URL", help="the checkpoint's data set")
    parser.add_argument("--epochs", type=int, default=30, help="of the decoders (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def measure(options: argparse.Namespace) -> Measurement:
    """Both tasks once; see `classify` and `segment` for errors."""
    shards = real_data(options.data, options.work / f"shards_{options.seed}", _deal(options.seed, options.data), texts=False)
    films = {"trained_films": "leave-out", "trained_on": options.trained_on}
    with ProgressBar("classify", total=None, unit="films") as bar:
        areas = classify(
            options.checkpoint,
            shards,
            options.work / f"classify_{options.seed}",
            LabelOptions(findings=(FINDING,), only=(FINDING, REST), seed=options.seed),
            ClassifyOptions(percents=(1.0, 10.0, 100.0), seed=options.seed, **films),
            start=bar.set_total,
            progress=bar.advance,
        )
    epochs = 2 if options.quick else options.epochs
    with ProgressBar("segment", total=None, unit="films") as bar:
        masks = segment(
            options.checkpoint,
            options.data,
            options.work / f"segment_{options.seed}_{epochs}",
            SegmentOptions(
                structures=STRUCTURES,
                schedule=Schedule(num_epochs=epochs, batch_size=8, head_lr=3e-3),
                seed=options.seed,
                leave_out_bad=True,
                **films,
            ),
            start=bar.set_total,
            progress=bar.advance,
        )
    return Measurement(
        figures={"auc": _areas(areas), "dice": _dice(masks)},
        goals={"auc.100.gain": Goal(min=0.0), "dice.gain.mean.value": Goal(min=0.0)},
        config={
            "checkpoint": areas["checkpoint"]["model_version"],
            "stages": areas["checkpoint"]["provenance"].get("stages"),
            "training_films": {"auc": areas["training_films"]["what"], "dice": masks["training_films"]["what"]},
            "films": {"auc": areas["data"]["films"], "dice": masks["data"]["films"]},
            "patients": {"auc": areas["data"]["patients"], "dice": masks["data"]["patients"]},
            "left_out": {"auc": areas["data"]["left_out"], "dice": masks["data"]["left_out"]},
            "seed": options.seed,
            "decoder_epochs": epochs,
            "baselines": {"auc": areas["policies"]["baseline"], "dice": masks["policies"]["baselines"]},
        },
        n=areas["data"]["num_cases"],
    )


def _deal(seed: int, data: Path) -> Callable[[Sequence[Row]], dict[str, str]]:
    """By patients, Pneumonia alike in every split."""

    def deal(rows: Sequence[Row]) -> dict[str, str]:
        films = [TaskFilm(row["file"], row["patient_group"], (int(FINDING in row["findings"]),), data) for row in rows]
        return {film.id: split for split, own in split_patients(films, seed, SHARES).items() for film in own}

    return deal


def _areas(card: dict[str, Any]) -> dict[str, Any]:
    """By per cent of the labels: both systems and the difference, with intervals."""
    name = f"auc_{FINDING.lower()}"
    found = {}
    for percent, each in card["details"]["by_percent_of_labels"].items():
        systems = each["systems"]
        found[percent] = {
            "frozen_features": systems["model"]["figures"][name],
            "raw_pixels": systems["raw_pixels"]["figures"][name],
            "gain": systems["difference"]["figures"][name],
            "intervals": {system: values["intervals"][name] for system, values in systems.items()},
            "train_films": each["train_films"],
        }
    tree: dict[str, Any] = rounded(found)
    return tree


def _dice(card: dict[str, Any]) -> dict[str, Any]:
    systems = {name: each["figures"] | {"intervals": each["intervals"]} for name, each in card["details"]["systems"].items()}
    gains = [name for name in card["metrics"] if name.startswith("dice_gain_")]
    gain = {name.removeprefix("dice_gain_"): {"value": card["metrics"][name], "interval": card["intervals"].get(name)} for name in gains}
    tree: dict[str, Any] = rounded(systems | {"gain": gain})
    return tree | {"films": card["details"]["films_in_test"]}


if __name__ == "__main__":
    sys.exit(run_benchmark("downstream", measure, add_arguments, description=__doc__))
