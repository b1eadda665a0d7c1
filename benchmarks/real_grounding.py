"""Lungs and mediastinum of real films: landmark error, centroid correlation and IoU of checkpoints trained without any box or mask.

python -m benchmarks.real_grounding [NAME=CHECKPOINT ...] --work DIR [--steps N] [--trained-on NAME=DATA_URL] [--save]

Trains on the pixels of the real films first (the contrastive stage of `configs/real_small.yaml`, `--steps` long, without the films of half
of the annotated patients), unless `--steps 0`. Goals are those of that model, or else of the first checkpoint. Films that any of the
checkpoints was trained on are left out for all; where a checkpoint's data set is not at hand, the record says so. Beside them: the centre,
chance, the average mask of other patients, that atlas moved by the true pose (the best that a rigid atlas can do), and a small net trained
on the masks of other patients (what masks would buy).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.real_data import REAL, hold_annotated_patients_out, real_data
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from ssacl.config import load_config
from ssacl.errors import ConfigError, DataError
from ssacl.evaluation.annotation_layouts import read_annotations
from ssacl.evaluation.conditions import CONDITIONS
from ssacl.evaluation.film_answers import ask_films
from ssacl.evaluation.film_baselines import NUM_FOLDS
from ssacl.evaluation.film_scores import rounded
from ssacl.evaluation.grounding_card import FilmScores, score_films
from ssacl.evaluation.lung_segmenter import segmenter_answers
from ssacl.evaluation.trained_films import seen_in_training
from ssacl.inference.generator import ReportGenerator
from ssacl.progress import ProgressBar
from ssacl.training.checkpoint import open_model
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter

TRAINED, STEPS = "real", 2500
GROUPS = ("right lung (mask)", "left lung (mask)", "right lung (box)", "left lung (box)", "mediastinum (mask)")
_FIGURES = ("pointing", "iou", "mean_iou", "cnr", "average_precision", "centroid_error", "correlation_x", "correlation_y")
PROTOTYPE = {
    "landmark_error": {"plain": 0.100, "affine": 0.097, "crop": 0.123},
    "phantom_only_landmark_error": {"plain": 0.139, "affine": 0.146, "crop": 0.162},
    "average_mask_landmark_error": {"plain": 0.155, "affine": 0.221, "crop": 0.229},
    "registered_iou": {"plain": [0.76, 0.77], "affine": [0.76, 0.77]},
}
"""METHOD section 8: its figures on 62 patients, with its own split and landmarks."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=URL")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="data set, run and answers are kept here")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the model that is trained here; 0: none (%(default)s)")
    parser.add_argument("--data", type=Path, default=REAL, metavar="DIR", help="the real folder")
    parser.add_argument("--trained-on", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--segmenter-steps", type=int, default=400)


def measure(options: argparse.Namespace) -> Measurement:
    """Ask every checkpoint about every film in every condition; see `evaluate_grounding` for errors."""
    checkpoints, trained_on = _pairs(options.checkpoints), _pairs(options.trained_on)
    if options.steps:
        data_url, model_url = _trained(options)
        checkpoints, trained_on = {TRAINED: model_url} | checkpoints, {TRAINED: data_url} | trained_on
    if not checkpoints:
        raise ConfigError("There is nothing to measure: give NAME=CHECKPOINT, or --steps above 0.")
    found = read_annotations(options.data).films[: 24 if options.quick else None]
    loaded = {name: open_model(url) for name, url in checkpoints.items()}
    seen = {name: seen_in_training(model, found, trained_on.get(name, "")) for name, model in loaded.items()}
    trained = {row for each in seen.values() for row in each.rows}
    films = [film for row, film in enumerate(found) if row not in trained]
    if not films:
        raise DataError("Every annotated film was trained on by one of the checkpoints; train on other patients.")
    systems: dict[str, Any] = {}
    with ProgressBar("answers", total=len(films) * len(CONDITIONS) * len(loaded), unit="films") as bar:
        for name, model in loaded.items():
            generator = ReportGenerator(model)
            systems[name] = {condition: ask_films(generator, films, condition, options.work, bar.advance) for condition in CONDITIONS}
    steps = 20 if options.quick else options.segmenter_steps
    with ProgressBar("supervised net", total=steps * NUM_FOLDS, unit="steps") as bar:
        systems["supervised"] = segmenter_answers(films, CONDITIONS, num_steps=steps, progress=bar.advance)
    scores = score_films(films, systems)
    first = next(iter(checkpoints))
    return Measurement(
        figures={"main": _main(scores, first), "landmarks": _landmarks(scores), "groups": _groups(scores), "prototype": PROTOTYPE},
        goals=_goals(),
        config={
            "checkpoints": {name: model.model_version for name, model in loaded.items()},
            "training_films": {name: each.how for name, each in seen.items()},
            "stages": {name: model.manifest.get("provenance", {}).get("stages") for name, model in loaded.items()},
            "segmenter_steps": steps,
            "num_folds": NUM_FOLDS,
        },
        n=len(films),
    )


def _trained(options: argparse.Namespace) -> tuple[str, str]:
    """Data set and model of the run; the same call goes on where it stood."""
    data_url = str(real_data(options.data, options.work / "real_shards", hold_annotated_patients_out, texts=True))
    steps = 4 if options.quick else options.steps
    overrides = [
        *(f"data.url={data_url}", f"run.storage_url={options.work / 'runs'}", f"run.name={TRAINED}-{steps}"),
        *(f"run.stages=[{{kind: contrastive, num_steps: {steps}}}]", "engine.kind=torch", "run.num_train_workers=1"),
    ]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    return data_url, train(load_config(REPOSITORY / "configs" / "real_small.yaml", overrides), LogReporter(0)).model_url


def _goals() -> dict[str, Goal]:
    goals = {f"main.{name}.landmark_error": Goal(max=bound) for name, bound in (("plain", 0.08), ("affine", 0.08), ("crop", 0.10))}
    for name in ("plain", "affine"):
        goals[f"main.{name}.correlation_x"] = Goal(min=0.95)
        goals[f"main.{name}.correlation_y"] = Goal(min=0.85)
        goals[f"main.{name}.registered_iou"] = Goal(min=0.80)
    return goals


def _main(scores: FilmScores, system: str) -> dict[str, Any]:
    """The gated figures of a checkpoint by condition; correlations and IoU are the worse lung's, against masks."""
    main: dict[str, Any] = {}
    for condition, results in scores.groups.items():
        groups = {result.group.name: result.systems for result in results}
        lungs = [groups[name] for name in GROUPS[:2] if name in groups]
        figures = {name: [each[system].means[name] for each in lungs] for name in ("correlation_x", "correlation_y", "iou")}
        figures["registered_iou"] = [each[f"{system}_registered"].means["iou"] for each in lungs]
        worst = {name: min((value for value in values if value is not None), default=None) for name, values in figures.items()}
        landmarks = scores.landmarks[condition].get("systems", {})
        main[condition] = rounded(
            {
                "landmark_error": landmarks.get(system, {}).get("landmark_error"),
                "registered_landmark_error": landmarks.get(f"{system}_registered", {}).get("landmark_error"),
                **worst,
            }
        )
    return main


def _landmarks(scores: FilmScores) -> dict[str, Any]:
    return {str(name): rounded(each) for name, each in scores.landmarks.items()}


def _groups(scores: FilmScores) -> dict[str, Any]:
    return {
        condition: {
            result.group.name: {"num_cases": len(result.rows)}
            | {name: rounded({figure: each.means[figure] for figure in _FIGURES}) for name, each in result.systems.items()}
            for result in results
            if result.group.name in GROUPS
        }
        for condition, results in scores.groups.items()
    }


def _pairs(given: list[str]) -> dict[str, str]:
    pairs = dict(each.split("=", 1) for each in given if "=" in each)
    if len(pairs) != len(given):
        raise ConfigError("Give NAME=URL, each NAME once.")
    return pairs


if __name__ == "__main__":
    sys.exit(run_benchmark("real_grounding", measure, add_arguments, description=__doc__))
