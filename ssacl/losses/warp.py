"""The warp of the masked pass: one affine map, applied alike to a picture and to the attention maps over it.

A warp row is (angle, log scale, shift x, shift y). What stands at p = (x, y) moves to e^s R(angle) p + shift, with x right, y down
and the square image [-1, 1]^2; a positive angle turns clockwise as seen on the image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

BLACK = -0.4978 / 0.2449
"""A black pixel after normalisation (mean 0.4978, std 0.2449 of the 0..1 image)."""
PADDING_ZEROS, PADDING_BORDER, PADDING_REFLECTION = 0, 1, 2
"""Codes of `Batch.warp_padding`. It varies, or the frame's edge becomes the cue for where things are."""


def patch_centres(grid: int, device: torch.device | str = "cpu") -> Tensor:
    """[grid^2, 2] float32 (x, y) of the patch centres, row by row, in [-1, 1]^2."""
    ticks = (torch.arange(grid, device=device, dtype=torch.float32) * 2 + 1) / grid - 1
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return torch.stack((x, y), dim=-1).reshape(-1, 2)


def warp_images(image_BCHW: Tensor, warp_B4: Tensor, padding_B: Tensor, black: float = BLACK) -> Tensor:
    """Warped pictures, bilinear. Outside the old frame: black, the border's pixels, or the picture reflected, per row.

    Parameters
    ----------
    image_BCHW
        Square pictures, normalised.
    padding_B
        int64 codes: 0 zeros (filled with `black`), 1 border, 2 reflection.
    """
    side = image_BCHW.shape[-1]
    source = _source_points(warp_B4, patch_centres(side, image_BCHW.device)).view(-1, side, side, 2)
    outside = (source.abs() > 1).any(-1)
    folded = 1 - ((source + 1).remainder(4) - 2).abs()
    source = torch.where((padding_B == PADDING_REFLECTION)[:, None, None, None], folded, source)
    warped = functional.grid_sample(image_BCHW, source.to(image_BCHW.dtype), mode="bilinear", padding_mode="border", align_corners=False)
    filled = outside & (padding_B == PADDING_ZEROS)[:, None, None]
    return warped.masked_fill(filled[:, None], black)


def warp_maps(maps_BGN: Tensor, warp_B4: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """Maps over patches, moved as `warp_images` moves the picture: bilinear, zero where the old picture does not reach.

    Returns
    -------
    tuple[Tensor, Tensor]
        maps [B, G, N] float32, not renormalised (values are kept, so mass grows with e^2s and is lost at the frame), and
        inside [B, N] bool: patches whose centre shows something of the old picture.
    """
    source = _source_points(warp_B4, patch_centres(grid, maps_BGN.device))
    maps = maps_BGN.float().view(*maps_BGN.shape[:2], grid, grid)
    # Border instead of zero padding: half of an edge patch's map must not fade away.
    moved = functional.grid_sample(maps, source.view(-1, grid, grid, 2), mode="bilinear", padding_mode="border", align_corners=False)
    inside = (source.abs() <= 1).all(-1)
    return moved.flatten(2) * inside[:, None], inside


def _source_points(warp_B4: Tensor, points_N2: Tensor) -> Tensor:
    """[B, N, 2] where the content that the warp brings to `points_N2` stood before."""
    angle, log_scale, shift = warp_B4[:, 0].float(), warp_B4[:, 1].float(), warp_B4[:, None, 2:].float()
    cos, sin = angle.cos() * (-log_scale).exp(), angle.sin() * (-log_scale).exp()
    inverse_B22 = torch.stack((cos, sin, -sin, cos), dim=-1).view(-1, 2, 2)
    return (points_N2 - shift) @ inverse_B22.transpose(1, 2)
