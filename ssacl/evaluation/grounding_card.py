"""`ssacl evaluate grounding`: a checkpoint on annotated films, as a score card with per-case figures and a contact sheet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssacl.errors import ConfigError
from ssacl.evaluation.annotation_layouts import read_annotations
from ssacl.evaluation.annotations import Film
from ssacl.evaluation.conditions import CONDITIONS, CROP, LOG_SCALE, ROTATION_DEG, SHIFT
from ssacl.evaluation.film_answers import ask_films, film_digest
from ssacl.evaluation.film_baselines import NUM_FOLDS
from ssacl.evaluation.film_grounding import MASK_PX, GroupResult, Systems, groups_of, score_group, score_landmarks
from ssacl.evaluation.film_scores import PER_CASE, rounded
from ssacl.evaluation.grounding_sheet import contact_sheet_png
from ssacl.evaluation.scorecard import FORMAT, installed_versions, write_card
from ssacl.evaluation.trained_films import POLICIES, allowed_films, seen_in_training
from ssacl.inference.files import write_whole
from ssacl.inference.generator import ReportGenerator
from ssacl.scores.map_measures import HIT_RADIUS
from ssacl.training.checkpoint import open_model

SHEET_NAME = "cases.png"
ANSWERS_FOLDER = "answers"
MODEL = "model"
_FIGURES = (*PER_CASE, "correlation_x", "correlation_y")
_PACKAGES = ("torch", "numpy", "scipy")


@dataclass(frozen=True)
class FilmScores:
    """Systems on films in every condition."""

    groups: dict[str, list[GroupResult]]
    """By condition."""
    landmarks: dict[str, dict[str, Any]]
    """By condition; see `score_landmarks`."""


def score_films(films: Sequence[Film], systems: Systems, conditions: Sequence[str] = CONDITIONS, seed: int = 0) -> FilmScores:
    """Every group of the films under every system and baseline."""
    groups = groups_of(films)
    scored = {name: [score_group(films, group, name, systems, seed) for group in groups] for name in conditions}
    return FilmScores(
        {name: [result for result in results if result is not None] for name, results in scored.items()},
        {name: score_landmarks(films, name, systems, seed) for name in conditions},
    )


def evaluate_grounding(
    checkpoint_url: str | Path,
    data_folder: str | Path,
    out_folder: str | Path,
    *,
    trained_on: str = "",
    trained_films: str = "refuse",
    leave_out_bad: bool = False,
    conditions: Sequence[str] = CONDITIONS,
    seed: int = 0,
    limit: int | None = None,
    start: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score a checkpoint's maps on annotated films; writes `scorecard.json`, `cases.png` and the answers into `out_folder`.

    Parameters
    ----------
    data_folder
        Films with boxes or masks in a layout of `annotation_layouts`.
    trained_on
        The checkpoint's data set, where it lies now.
    trained_films
        What to do with films of its training split: one of `POLICIES`.
    leave_out_bad
        Leave out, and count, annotations that cannot be used.
    limit
        First films only.
    start, progress
        Called with the number of answers that there will be, and with 1 after each.

    Returns
    -------
    dict
        The card: `metrics` (main figures), `groups` and `landmarks` (everything, by condition), `cases` (the model, case by case).

    Raises
    ------
    DataError
        Annotations are bad, or films were trained on.
    CheckpointError, GenerationError, ImageError, StorageError
        The checkpoint or a film cannot be read, its weights are damaged, or the disk refuses.
    """
    if trained_films not in POLICIES or not conditions or set(conditions) - set(CONDITIONS):
        raise ConfigError(f"Policies are {', '.join(POLICIES)}; conditions {', '.join(CONDITIONS)}.")
    annotations = read_annotations(data_folder, leave_out_bad=leave_out_bad)
    loaded = open_model(checkpoint_url)
    generator = ReportGenerator(loaded)
    found = list(annotations.films[:limit])
    seen = seen_in_training(loaded, found, trained_on)
    films = allowed_films(found, seen, trained_films)
    if start is not None:
        start(len(films) * len(conditions))
    kept_in = Path(out_folder) / ANSWERS_FOLDER
    systems: Systems = {MODEL: {name: ask_films(generator, films, name, kept_in, progress, seed) for name in conditions}}
    scores = score_films(films, systems, conditions, seed)
    patients = [film.patient for film in films]
    digests = [film_digest(film) for film in films]
    card = {
        "format": FORMAT,
        "task": "grounding",
        "data": {
            "sha256": annotations_digest(films, digests),
            "layout": annotations.layout,
            "num_films": len(films),
            "num_patients": len(set(patients)),
            "patients_known": annotations.patients_known,
            "limit": limit,
            "left_out": annotations.left_out,
        },
        "training_films": {"checked": seen.checked, "policy": trained_films, "num": len(seen.rows), "what": seen.how},
        "checkpoint": {key: value for key, value in generator.describe().items() if key != "thresholds"},
        "conditions": {
            "plain": "as filmed",
            "affine": {"shift": SHIFT, "log_scale": LOG_SCALE, "rotation_deg": ROTATION_DEG},
            "crop": {"window": list(CROP)},
        },
        "policies": {
            "hit_radius_of_side": round(HIT_RADIUS, 4),
            "mask_px": MASK_PX,
            "fitted_on": f"other patients' films, in {NUM_FOLDS} folds",
            "seed": seed,
        },
        "versions": installed_versions(_PACKAGES),
        "metrics": main_figures(scores),
        "groups": {
            name: {result.group.name: rounded(result.to_json(patients)) for result in results} for name, results in scores.groups.items()
        },
        "landmarks": rounded(scores.landmarks),
        "cases": _cases(scores, digests),
    }
    write_card(card, out_folder)
    write_whole(Path(out_folder) / SHEET_NAME, contact_sheet_png(films, scores.groups[conditions[0]], systems[MODEL], conditions[0], seed))
    return card


def main_figures(scores: FilmScores, system: str = MODEL) -> dict[str, float | None]:
    """`CONDITION_KIND_FIGURE`: the unweighted mean over the groups of a kind; `CONDITION_landmark_error` where there are lung masks."""
    figures: dict[str, float | None] = {}
    for condition, results in scores.groups.items():
        for kind in dict.fromkeys(result.group.kind for result in results):
            own = [result.systems[system] for result in results if result.group.kind == kind and system in result.systems]
            for name in _FIGURES:
                values = [value for each in own if (value := each.means[name]) is not None]
                figures[f"{condition}_{kind}_{name}"] = float(np.mean(values)) if values else None
        if landmarks := scores.landmarks[condition]:
            figures[f"{condition}_landmark_error"] = landmarks["systems"][system]["landmark_error"]
    return {name: rounded(value) for name, value in figures.items()}


def annotations_digest(films: Sequence[Film], digests: Sequence[str]) -> str:
    """sha256 of the films' pixels and of everything drawn on them."""
    whole = hashlib.sha256()
    for film, digest in zip(films, digests, strict=True):
        whole.update(digest.encode())
        for target in film.targets:
            drawn = target.mask_path.read_bytes() if target.mask_path else repr(target.boxes).encode()
            whole.update(f"{target.asked}|{target.mask_value}|".encode() + hashlib.sha256(drawn).digest())
    return whole.hexdigest()


def _cases(scores: FilmScores, digests: Sequence[str]) -> list[dict[str, Any]]:
    """The model's figures case by case; films are named by their digests, phrases not at all."""
    return [
        {
            "film": digests[result.group.films[row]][:16],
            "group": result.group.name,
            "condition": condition,
            **{name: rounded(float(values[place])) for name, values in result.systems[MODEL].cases.items()},
        }
        for condition, results in scores.groups.items()
        for result in results
        for place, row in enumerate(result.rows)
    ]


def table_rows(card: Mapping[str, Any], min_cases: int = 1) -> list[dict[str, Any]]:
    """One row per condition, group and system, for a table."""
    return [
        {"condition": condition, "group": name, "num_cases": group["num_cases"], "system": system, **figures}
        for condition, groups in card["groups"].items()
        for name, group in groups.items()
        if group["num_cases"] >= min_cases
        for system, figures in group["systems"].items()
    ]
