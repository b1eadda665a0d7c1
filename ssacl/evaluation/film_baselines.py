"""What a map is held against: the centre, chance, the average mask of other patients, and that average moved by a pose.

Nothing here, nor any threshold or offset, is fitted on the patient it is used for: patients are dealt into folds, and a fold is fitted on
the others.

Shape letters: n cases, S mask side, g map side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ssacl.drawing import REACH
from ssacl.evaluation.conditions import Pose
from ssacl.losses.registration import SCALES, lay_maps
from ssacl.losses.warp import patch_centres

NUM_FOLDS = 5
ATLAS_PX = 112
"""Side of the average in the atlas' frame, which covers [-REACH, REACH]^2 half-widths."""
Folds = NDArray[np.int64]


def deal_folds(patients: Sequence[str], num_folds: int = NUM_FOLDS) -> Folds:
    """[n] each case's fold: patients in the order of their hashes, dealt in turn, so that no fold lacks patients."""
    order = sorted(set(patients), key=lambda patient: hashlib.sha256(patient.encode()).hexdigest())
    fold = {patient: index % num_folds for index, patient in enumerate(order)}
    return np.array([fold[patient] for patient in patients], dtype=np.int64)


def fit_rows(folds: Folds, fold: int) -> NDArray[np.int64]:
    """The cases that fold `fold` is fitted on: all others."""
    return np.flatnonzero(folds != fold)


def average_masks(masks: NDArray[np.bool_], folds: Folds) -> NDArray[np.float32]:
    """[n, S, S] for each case the mean mask of the other folds; uniform where they show nothing."""
    averages = np.empty(masks.shape, dtype=np.float32)
    for fold in np.unique(folds):
        mean = masks[fit_rows(folds, fold)].mean(axis=0, dtype=np.float64)
        averages[folds == fold] = mean if mean.any() else 1.0
    return averages


def moved_averages(plain_masks: NDArray[np.bool_], folds: Folds, poses: Sequence[Pose]) -> NDArray[np.float32]:
    """[n, S, S] the mean mask as filmed of the other folds, moved by each case's true pose: what a rigid atlas can reach at best."""
    averages = average_masks(plain_masks, folds)
    return np.stack([pose.moved_image(each) for pose, each in zip(poses, averages, strict=True)])


def registered_averages(masks: NDArray[np.bool_], folds: Folds, poses_n23: NDArray[np.float64]) -> NDArray[np.float32]:
    """[n, S, S] the mean mask of the other folds in the atlas' frame, where a model's poses bring them, laid on each case by its own.

    Parameters
    ----------
    poses_n23
        Affine maps from the atlas' frame to each case's square, found by the model without any mask.
    """
    poses = torch.from_numpy(np.asarray(poses_n23, dtype=np.float32))
    points = patch_centres(ATLAS_PX) * REACH
    source = points[None] @ poses[:, :, :2].transpose(1, 2) + poses[:, None, :, 2]
    stack = torch.from_numpy(masks.astype(np.float32))[:, None]
    in_atlas = functional.grid_sample(stack, source.view(-1, ATLAS_PX, ATLAS_PX, 2), padding_mode="zeros", align_corners=False)
    # Where a case's square does not reach, it says nothing: the mean is over those that do.
    reached = (source.abs() <= 1).all(-1).view(-1, 1, ATLAS_PX, ATLAS_PX).float()
    laid = np.empty(masks.shape, dtype=np.float32)
    for fold in np.unique(folds):
        rows, own = fit_rows(folds, fold), np.flatnonzero(folds == fold)
        mean = in_atlas[rows].sum(0) / reached[rows].sum(0).clamp_min(1)
        maps = lay_maps(mean[None].expand(len(own), -1, -1, -1), poses[own], masks.shape[-1], REACH)
        laid[own] = maps.view(len(own), *masks.shape[1:]).numpy()
    return laid


def offset_points(points: NDArray[np.float64], truth: NDArray[np.float64], folds: Folds) -> NDArray[np.float64]:
    """[n, L, 2] points plus one constant offset per landmark, the mean of truth - point over the other folds (not-a-numbers left out)."""
    moved = np.full(points.shape, np.nan)
    for fold in np.unique(folds):
        rows = fit_rows(folds, fold)
        moved[folds == fold] = points[folds == fold] + _mean(truth[rows] - points[rows])
    return moved


def registered_points(truth: NDArray[np.float64], folds: Folds, poses_n23: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, L, 2] the mean landmark of the other folds in the atlas' frame, laid on each case by its pose."""
    turns, shifts = poses_n23[:, :, :2], poses_n23[:, None, :, 2]
    turn, scales, back = np.linalg.svd(turns)
    inverse = np.swapaxes(back, 1, 2) @ (np.swapaxes(turn, 1, 2) / scales.clip(*SCALES)[:, :, None])
    in_atlas = (truth - shifts) @ np.swapaxes(inverse, 1, 2)
    laid = np.full(truth.shape, np.nan)
    for fold in np.unique(folds):
        own = folds == fold
        laid[own] = _mean(in_atlas[fit_rows(folds, fold)]) @ np.swapaxes(turns[own], 1, 2) + shifts[own]
    return laid


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis without not-a-numbers; 0 where there is nothing."""
    there = np.isfinite(values)
    return np.asarray(np.where(there, values, 0.0).sum(0) / np.maximum(there.sum(0), 1))
