"""From attention on the patch grid to maps and boxes on the original picture.

A map is [g, g] float32 over the model's square input, non-negative, sums to 1. Its *frame* is the rectangle of original pixels that
the square covers: larger than the picture where the square was padded, smaller where it was cropped. Coordinates are edges, not
centres: pixel (0, 0) covers [0, 1) x [0, 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from ssacl.inference.report import Box

SMOOTHING_CELLS = 1.5
"""Standard deviation of the Gaussian, in grid cells (METHOD section 5)."""
BOX_MASS_SHARE = 0.5
"""A box bounds the brightest cells that together hold this share of the map's mass."""
_BOX_RESOLUTION = 192  # samples along the longer side; a box edge is then within 0.3 % of the picture's side


def normalised_map(raw: ArrayLike, sigma_cells: float = SMOOTHING_CELLS) -> NDArray[np.float32]:
    """Clean, smooth and normalise one attention map.

    Parameters
    ----------
    raw
        [g, g] attention; not-a-number, infinite and negative values count as 0.
    sigma_cells
        Gaussian smoothing in grid cells; 0 for none.

    Returns
    -------
    [g, g] float32, non-negative, sums to 1. A map without any mass becomes uniform: it points nowhere.
    """
    clean = np.nan_to_num(np.asarray(raw, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    if sigma_cells > 0:
        # "nearest" would pile mass up at the border, where attention sinks sit; "constant" lets it leave instead.
        clean = ndimage.gaussian_filter(clean, sigma_cells, mode="constant")
    mass = clean.sum()
    if not mass > 0:
        return np.full(clean.shape, 1.0 / clean.size, dtype=np.float32)
    return np.asarray(clean / mass, dtype=np.float32)


def restrict_to_picture(grid_map: ArrayLike, frame: Box, width_px: int, height_px: int) -> NDArray[np.float64]:
    """Weigh each cell by the share of it that lies on the picture, so that padding holds no evidence."""
    weights = np.asarray(grid_map, dtype=np.float64)
    rows, columns = weights.shape
    return weights * _covered(rows, frame.y0, frame.y1, height_px)[:, None] * _covered(columns, frame.x0, frame.x1, width_px)[None, :]


def map_on_picture(
    grid_map: ArrayLike, frame: Box, width_px: int, height_px: int, out_width: int = 0, out_height: int = 0
) -> NDArray[np.float32]:
    """Smooth resample of a grid map onto the picture.

    Parameters
    ----------
    grid_map
        [g, g], any scale.
    frame
        Where the grid lies, in original pixels.
    width_px, height_px
        Size of the original picture.
    out_width, out_height
        Samples wanted; 0 for one per original pixel.

    Returns
    -------
    [out_height, out_width] float32, scaled to a maximum of 1 (0 everywhere for a map without mass).
    """
    grid = np.nan_to_num(np.asarray(grid_map, dtype=np.float64))
    rows, columns = grid.shape
    down = _interpolation(rows, frame.y0, frame.y1, height_px, out_height or height_px)
    across = _interpolation(columns, frame.x0, frame.x1, width_px, out_width or width_px)
    image = (down @ grid @ across.T).clip(min=0.0)
    peak = image.max()
    return np.asarray(image / peak if peak > 0 else np.zeros_like(image), dtype=np.float32)


def box_of_map(grid_map: ArrayLike, frame: Box, width_px: int, height_px: int, mass_share: float = BOX_MASS_SHARE) -> Box | None:
    """Bounds, in original pixels, of the brightest region of a map (`region_of_map`). None when the map is flat: it points nowhere."""
    region = region_of_map(grid_map, frame, width_px, height_px, mass_share)
    if region is None:
        return None
    ys, xs = np.nonzero(region)
    step_x, step_y = width_px / region.shape[1], height_px / region.shape[0]
    return Box(
        x0=float(xs.min() * step_x),
        y0=float(ys.min() * step_y),
        x1=float((xs.max() + 1) * step_x),
        y1=float((ys.max() + 1) * step_y),
    )


def region_of_map(
    grid_map: ArrayLike, frame: Box, width_px: int, height_px: int, mass_share: float = BOX_MASS_SHARE
) -> NDArray[np.bool_] | None:
    """The brightest region of a map, sampled over the picture at 192 along its longer side; None when the map is flat.

    The region is the smallest set of samples holding `mass_share` of the mass on the picture; of its connected parts, the one with the
    maximum.
    """
    scale = _BOX_RESOLUTION / max(width_px, height_px)
    out_width, out_height = max(1, round(width_px * scale)), max(1, round(height_px * scale))
    image = map_on_picture(grid_map, frame, width_px, height_px, out_width, out_height).astype(np.float64)
    if image.max() <= 0 or np.ptp(image) < 1e-6:
        return None
    falling = np.sort(image, axis=None)[::-1]
    held = np.cumsum(falling)
    threshold = falling[min(int(np.searchsorted(held, mass_share * held[-1])), falling.size - 1)]
    parts, _ = ndimage.label(image >= threshold)
    peak = np.unravel_index(int(image.argmax()), image.shape)
    return np.asarray(parts == parts[peak])


def _interpolation(num_cells: int, start: float, end: float, length_px: int, num_samples: int) -> NDArray[np.float64]:
    """[num_samples, num_cells] weights of cubic (Catmull-Rom) interpolation between cell centres; border cells are held constant.

    Cubic, because a peak of a few cells drawn linearly shows a cross that is no evidence.
    """
    at = (np.arange(num_samples) + 0.5) * (length_px / num_samples)
    position = ((at - start) / (end - start) * num_cells - 0.5).clip(0, num_cells - 1)
    low = np.floor(position).astype(int)
    t = position - low
    taps = (
        (-0.5 * t + t**2 - 0.5 * t**3, low - 1),
        (1 - 2.5 * t**2 + 1.5 * t**3, low),
        (0.5 * t + 2 * t**2 - 1.5 * t**3, low + 1),
        (-0.5 * t**2 + 0.5 * t**3, low + 2),
    )
    weights = np.zeros((num_samples, num_cells))
    for share, cell in taps:
        np.add.at(weights, (np.arange(num_samples), cell.clip(0, num_cells - 1)), share)
    return weights


def _covered(num_cells: int, start: float, end: float, length_px: int) -> NDArray[np.float64]:
    """Share of each cell that lies in [0, length_px]."""
    edges = np.linspace(start, end, num_cells + 1).clip(0, length_px)
    return np.diff(edges) / ((end - start) / num_cells)
