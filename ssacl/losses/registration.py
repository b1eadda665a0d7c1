"""The atlas laid on a patient: the affine map from the drawing's frame to the film that the leaves' attention centroids imply.

Shape letters: B films, M = 25 leaves, G = 32 nodes, N patches.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from ssacl.atlas import CHART
from ssacl.drawing import REACH, drawn_nodes
from ssacl.losses.warp import patch_centres

SCALES = (0.55, 1.25)
"""Range of the two principal scales of a plausible pose, as sizes of the drawing on a film: small children to close collimation."""
_SAMPLES = 2
"""Samples along a patch's side when maps are laid on the patches."""


def fit_pose(centroid_BM2: Tensor) -> Tensor:
    """Least-squares affine map from the chart to the leaves' centroids: [B, 2, 3], for points (x, y, 1) in half-widths."""
    pose: Tensor = (_fitter().to(centroid_BM2.device) @ centroid_BM2.float()).transpose(1, 2)
    return pose


def principal_scales(pose_B23: Tensor) -> tuple[Tensor, Tensor]:
    """Smaller and larger principal scale [B] of the poses; the smaller one is negative where the pose mirrors."""
    linear = pose_B23[:, :, :2]
    twice_det = 2 * (linear[:, 0, 0] * linear[:, 1, 1] - linear[:, 0, 1] * linear[:, 1, 0])
    square = linear.square().sum((1, 2))
    # The sum and the difference of the two singular values.
    both, apart = ((square + sign * twice_det).clamp_min(1e-6).sqrt() for sign in (1, -1))
    return (both - apart) / 2, (both + apart) / 2


def lay_drawing(pose_B23: Tensor, grid: int) -> Tensor:
    """The atlas' drawing on the patches: [B, G, N] float32, the share of each patch that a node covers."""
    return lay_maps(_drawing().to(pose_B23.device).expand(len(pose_B23), -1, -1, -1), pose_B23, grid, REACH)


def lay_maps(atlas_BKRR: Tensor, pose_B23: Tensor, grid: int, reach: float = 1.0) -> Tensor:
    """Maps in the atlas' frame, over [-reach, reach]^2 half-widths, laid on the patches of posed films: [B, K, N] float32, 0 outside.

    The pose's principal scales are held within `SCALES`, so that centroids that lie together (early in training) still give a picture.
    """
    linear, shift = pose_B23[:, :, :2].float(), pose_B23[:, :, 2].float()
    # A run that diverges is stopped by its losses, which stay not finite; the decomposition would raise an error of its own.
    turn, scales, back = torch.linalg.svd(linear.nan_to_num(0, 0, 0))
    inverse = back.transpose(1, 2) @ torch.diag_embed(1 / scales.clamp(*SCALES)) @ turn.transpose(1, 2)
    side = grid * _SAMPLES
    points_P2 = patch_centres(side, pose_B23.device)
    source = (points_P2[None] - shift[:, None]) @ inverse.transpose(1, 2) / reach
    laid = functional.grid_sample(atlas_BKRR, source.view(-1, side, side, 2), padding_mode="zeros", align_corners=False)
    shares: Tensor = functional.avg_pool2d(laid, _SAMPLES).flatten(2)
    return shares


@lru_cache(maxsize=1)
@torch.inference_mode(False)  # Training may take what inference has cached.
def _fitter() -> Tensor:
    """[3, M] pseudo-inverse of the chart's homogeneous points."""
    chart = torch.tensor(CHART, dtype=torch.float64)
    fitter: Tensor = torch.linalg.pinv(torch.cat([chart, torch.ones_like(chart[:, :1])], 1)).float()
    return fitter


@lru_cache(maxsize=1)
@torch.inference_mode(False)  # Training may take what inference has cached.
def _drawing() -> Tensor:
    """[1, G, R, R] the raster, smoothed by a pixel so that sampling does not alias."""
    smoothed: Tensor = functional.avg_pool2d(torch.from_numpy(drawn_nodes())[None], 3, 1, 1)
    return smoothed
