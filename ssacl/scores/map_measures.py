"""From maps and true masks to the few numbers that every grounding score is made of: one pass over the pixels.

Shape letters: n cases, K nodes, g grid side, S mask side in pixels. Maps and masks cover the same square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ssacl.inference.maps import normalised_map

HIT_RADIUS = 16 / 224
"""A maximum this near to the mask, as a share of the side, is a hit (16 px on a 224 px picture)."""
NUM_LEVELS = 256
"""Maps are quantised to this many shares of their maximum before a threshold is applied."""

Maps = NDArray[np.floating[Any]]
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Threshold:
    """Where a map is cut: "relative" keeps pixels >= value x maximum; "area" keeps the brightest share `value` of the square."""

    kind: str
    value: float


@dataclass(frozen=True)
class Measured:
    """Everything that the scores need, without pixels."""

    shown: NDArray[np.bool_]
    """[n, K] the mask has pixels."""
    hit: NDArray[np.bool_]
    """[n, K]."""
    map_centroid: NDArray[np.float64]
    """[n, K, 2] (x, y) in [-1, 1], of the map before smoothing."""
    mask_centroid: NDArray[np.float64]
    kept: NDArray[np.int64]
    """[n, K, NUM_LEVELS] pixels at or above each level."""
    kept_in_mask: NDArray[np.int64]
    area: NDArray[np.int64]
    """[n, K] mask pixels."""


def measure(maps: Maps, masks: Masks, sigma_cells: float) -> Measured:
    """One pass over the pixels of [n, K, g, g] maps and [n, K, S, S] masks."""
    num_cases, num_nodes, side = masks.shape[:3]
    shape = (num_cases, num_nodes)
    hit = np.zeros(shape, dtype=bool)
    kept = np.zeros((*shape, NUM_LEVELS), dtype=np.int64)
    kept_in_mask = np.zeros_like(kept)
    offsets = np.arange(num_nodes, dtype=np.int32)[:, None] * np.int32(NUM_LEVELS)
    for case in range(num_cases):
        image = _upsampled(maps[case], side, sigma_cells)
        hit[case] = _hits(image, masks[case])
        # One count over (in the mask or not, node, level) instead of two passes.
        bins = (image.reshape(num_nodes, -1) * (NUM_LEVELS - 1)).astype(np.int32) + offsets
        bins += masks[case].reshape(num_nodes, -1) * np.int32(num_nodes * NUM_LEVELS)
        counts = np.bincount(bins.ravel(), minlength=2 * num_nodes * NUM_LEVELS).reshape(2, num_nodes, NUM_LEVELS)
        kept[case], kept_in_mask[case] = _at_or_above(counts.sum(0)), _at_or_above(counts[1])
    area = masks.sum(axis=(2, 3), dtype=np.int64)
    return Measured(area > 0, hit, map_centroids(maps), map_centroids(masks), kept, kept_in_mask, area)


def _upsampled(case_maps: Maps, side: int, sigma_cells: float) -> NDArray[np.float32]:
    """[K, S, S] smoothed, resized, scaled to a maximum of 1."""
    smooth = case_maps
    if sigma_cells > 0:
        smooth = np.stack([normalised_map(each, sigma_cells) for each in case_maps])
    image = torch.from_numpy(np.array(smooth, dtype=np.float32))[None]
    if image.shape[-1] != side:
        image = functional.interpolate(image, size=(side, side), mode="bilinear", align_corners=False)
    peak = image.amax(dim=(2, 3), keepdim=True)
    scaled: NDArray[np.float32] = torch.where(peak > 0, image / peak.clamp_min(1e-30), torch.ones(()))[0].numpy()
    return scaled


def _hits(image: NDArray[np.float32], masks: Masks) -> NDArray[np.bool_]:
    """[K] is there a mask pixel within the hit radius of the maximum (of its plateau's middle, where it is flat)."""
    side = image.shape[-1]
    radius = HIT_RADIUS * side
    reach = int(radius)
    offsets = np.arange(-reach, reach + 1)
    disc = offsets[:, None] ** 2 + offsets[None] ** 2 <= radius**2
    hits = np.zeros(len(image), dtype=bool)
    for index, (each, mask) in enumerate(zip(image, masks, strict=True)):
        # An average mask is flat where all cases agree; its corner would be an unfair point.
        ys, xs = np.nonzero(each >= 1.0 - 1e-6)
        nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
        y, x = int(ys[nearest]), int(xs[nearest])
        y0, y1, x0, x1 = max(0, y - reach), min(side, y + reach + 1), max(0, x - reach), min(side, x + reach + 1)
        window = disc[y0 - y + reach : y1 - y + reach, x0 - x + reach : x1 - x + reach]
        hits[index] = bool((mask[y0:y1, x0:x1] & window).any())
    return hits


def _at_or_above(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts per level [K, L] -> counts at that level or a higher one."""
    return np.cumsum(counts[:, ::-1], axis=1)[:, ::-1]


def map_centroids(maps: NDArray[Any]) -> NDArray[np.float64]:
    """[n, K, 2] centroid (x, y) in [-1, 1] of maps or masks [n, K, s, s]; the middle where there is no mass."""
    side = maps.shape[-1]
    ticks = (np.arange(side) * 2 + 1) / side - 1
    across = maps.sum(axis=2, dtype=np.float64)
    down = maps.sum(axis=3, dtype=np.float64)
    mass = across.sum(axis=-1)
    safe = np.where(mass > 0, mass, 1.0)
    return np.stack((across @ ticks / safe, down @ ticks / safe), axis=-1)


def iou_at(measured: Measured, column: int, threshold: Threshold) -> NDArray[np.float64]:
    """[n] IoU of the cut map with the mask; 0 where there is no mask."""
    kept, area = measured.kept[:, column], measured.area[:, column]
    if threshold.kind == "relative":
        level = np.full(len(kept), int(np.ceil(threshold.value * (NUM_LEVELS - 1))))
    else:
        wanted = threshold.value * kept[:, 0]
        # The highest level that keeps at least the wanted area; ties in a map can keep more.
        level = (kept >= wanted[:, None]).sum(axis=1) - 1
    rows = np.arange(len(kept))
    overlap = measured.kept_in_mask[rows, column, level]
    union = kept[rows, level] + area - overlap
    return np.asarray(overlap / np.maximum(union, 1), dtype=np.float64)
