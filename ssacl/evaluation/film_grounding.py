"""Systems on annotated films, side by side with what needs no model, per anatomy and per finding, in every condition.

A system is a name and its answers (`film_answers.Answer`) by condition. With a pose, a system also registers the average mask of other
patients (`NAME_registered`): the atlas that only the pose comes from the model.

Shape letters: n cases, S mask side.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.evaluation.annotations import Asked, Film, Target, anatomy_order, square_target
from ssacl.evaluation.conditions import Pose
from ssacl.evaluation.film_answers import Answer, film_pose
from ssacl.evaluation.film_baselines import (
    Folds,
    average_masks,
    deal_folds,
    moved_averages,
    offset_points,
    registered_averages,
    registered_points,
)
from ssacl.evaluation.film_scores import GroupScores, interval, landmark_errors, mean_of, score_maps
from ssacl.evaluation.grounding import centre_maps, random_maps
from ssacl.evaluation.lung_landmarks import LANDMARKS, lung_landmarks
from ssacl.scores.map_measures import Maps

MASK_PX = 112
"""Side at which maps and masks are compared."""
LANDMARK_PX = 448
"""Side at which landmarks are read from masks."""
LUNGS = ("right lung", "left lung")
Systems = Mapping[str, Mapping[str, Sequence[Answer]]]
"""System -> condition -> one answer per film."""


@dataclass(frozen=True)
class Group:
    """The cases of one anatomy, finding or category of phrases, drawn alike."""

    name: str
    kind: str
    films: tuple[int, ...]
    """Index of each case's film."""
    targets: tuple[Target, ...]

    @property
    def asked(self) -> tuple[Asked, ...]:
        return tuple(target.asked for target in self.targets)


def groups_of(films: Sequence[Film]) -> list[Group]:
    """`NAME (mask)` and `NAME (box)` apart: drawn boxes are looser than masks."""
    found: dict[tuple[str, str], list[tuple[int, Target]]] = defaultdict(list)
    for row, film in enumerate(films):
        for target in film.targets:
            found[target.asked.group, target.drawn_as].append((row, target))
    order = {name: place for place, name in enumerate(anatomy_order(list({name for name, _ in found})))}
    return [
        Group(f"{name} ({drawn})", pairs[0][1].asked.kind, tuple(row for row, _ in pairs), tuple(target for _, target in pairs))
        for (name, drawn), pairs in sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    ]


@dataclass(frozen=True)
class GroupResult:
    """A group in one condition."""

    group: Group
    rows: NDArray[np.int64]
    """The cases of the group that are in sight."""
    systems: dict[str, GroupScores]

    def to_json(self, patients: Sequence[str]) -> dict[str, Any]:
        """Counts, and each system's means and intervals."""
        return {
            "kind": self.group.kind,
            "num_cases": len(self.rows),
            "num_patients": len({patients[self.group.films[row]] for row in self.rows}),
            "num_out_of_view": len(self.group.films) - len(self.rows),
            "systems": {name: {**scores.means, "intervals": scores.intervals} for name, scores in self.systems.items()},
        }


def score_group(films: Sequence[Film], group: Group, condition: str, systems: Systems, seed: int = 0) -> GroupResult | None:
    """Every system and baseline on a group's cases in a condition; None where no case is in sight."""
    plain = np.stack([square_target(films[row], target, MASK_PX) for row, target in zip(group.films, group.targets, strict=True)])
    poses = [film_pose(films[row], condition, seed) for row in group.films]
    moved = np.stack([pose.moved_mask(mask) for pose, mask in zip(poses, plain, strict=True)])
    rows = np.flatnonzero(moved.any(axis=(1, 2)))
    if not len(rows):
        return None
    masks, own = moved[rows], [group.films[row] for row in rows]
    patients = [films[row].patient for row in own]
    folds = deal_folds(patients)
    maps: dict[str, tuple[Maps, bool]] = {}
    for name, by_condition in systems.items():
        answers = [by_condition[condition][row] for row in own]
        asked = [group.asked[row] for row in rows]
        if all(each in answer.maps for each, answer in zip(asked, answers, strict=True)):
            maps[name] = np.stack([answer.maps[each] for each, answer in zip(asked, answers, strict=True)]), False
        if (posed := _poses(answers)) is not None:
            maps[f"{name}_registered"] = registered_averages(masks, folds, posed), False
    maps["average_mask"] = average_masks(masks, folds), True
    if condition != "plain":
        maps["atlas_true_pose"] = moved_averages(plain[rows], folds, [poses[row] for row in rows]), False
    maps["centre"] = centre_maps(len(rows), 14, 1)[:, 0], True
    maps["random"] = random_maps(len(rows), 14, seed, 1)[:, 0], False
    scored = {name: score_maps(each, masks, folds, patients, never_moves=fixed, seed=seed) for name, (each, fixed) in maps.items()}
    return GroupResult(group, rows, scored)


def score_landmarks(films: Sequence[Film], condition: str, systems: Systems, seed: int = 0) -> dict[str, Any]:
    """Landmark errors of every system on the films with masks of both lungs; empty where fewer than two patients have them.

    Every point set gets one constant offset per landmark from other patients, so that what is measured is whether points follow the
    patient. `average_landmarks` knows no film; `atlas_true_pose` are other patients' landmarks as filmed, moved by the true pose.
    """
    found = [(row, truth) for row, film in enumerate(films) if (truth := _lung_truth(film)) is not None]
    patients = [films[row].patient for row, _ in found]
    if len(set(patients)) < 2:
        return {}
    poses = [film_pose(films[row], condition, seed) for row, _ in found]
    plain = np.stack([truth for _, truth in found])
    truth = _in_sight(np.stack([pose.moved(each) for pose, each in zip(poses, plain, strict=True)]))
    folds = deal_folds(patients)
    points: dict[str, NDArray[np.float64]] = {}
    for name, by_condition in systems.items():
        answers = [by_condition[condition][row] for row, _ in found]
        if all(answer.landmarks is not None for answer in answers):
            points[name] = offset_points(np.stack([np.asarray(answer.landmarks) for answer in answers]), truth, folds)
        if (posed := _poses(answers)) is not None:
            points[f"{name}_registered"] = registered_points(truth, folds, posed)
    points["average_landmarks"] = offset_points(np.zeros_like(truth), truth, folds)
    if condition != "plain":
        points["atlas_true_pose"] = _moved_landmarks(plain, folds, poses)
    errors = {name: landmark_errors(each, truth) for name, each in points.items()}
    return {
        "num_films": len(found),
        "num_patients": len(set(patients)),
        "num_landmarks_out_of_view": int((~np.isfinite(truth[:, :, 0])).sum()),
        "systems": {
            name: {
                "landmark_error": mean_of(each),
                "interval": interval(each, patients, seed),
                "by_landmark": {landmark: mean_of(each[:, column]) for column, landmark in enumerate(LANDMARKS)},
            }
            for name, each in errors.items()
        },
    }


def _poses(answers: Sequence[Answer]) -> NDArray[np.float64] | None:
    """[n, 2, 3], None where an answer has none."""
    poses = [answer.pose for answer in answers if answer.pose is not None]
    return np.stack(poses) if len(poses) == len(answers) else None


def _lung_truth(film: Film) -> NDArray[np.float64] | None:
    """[12, 2] landmarks of a film with masks of both lungs."""
    masks = {target.asked.group: target for target in film.targets if target.drawn_as == "mask" and target.asked.group in LUNGS}
    if len(masks) < 2:
        return None
    right, left = (square_target(film, masks[lung], LANDMARK_PX) for lung in LUNGS)
    return lung_landmarks(right, left)


def _in_sight(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points outside of the square become not-a-numbers."""
    return np.where((np.abs(points) <= 1).all(-1, keepdims=True), points, np.nan)


def _moved_landmarks(plain: NDArray[np.float64], folds: Folds, poses: Sequence[Pose]) -> NDArray[np.float64]:
    means = offset_points(np.zeros_like(plain), plain, folds)
    return np.stack([pose.moved(each) for pose, each in zip(poses, means, strict=True)])
