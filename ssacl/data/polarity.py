"""Is a frontal chest film shown with its greys inverted? A check on the declared photometric interpretation.

Files exist whose header was relabelled MONOCHROME1 while the stored values stayed as they were. A reader that follows the header
shows these inverted. The check compares the film with where air and soft tissue lie on any frontal chest film; it is made to be
silent unless the answer is clear. Figures on real films: docs/DECISIONS.md.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID = 32
_MAX_SIDE_PX = 512
INVERTED_BELOW = -0.25
"""Of 1,042 real frontal films the lowest score was -0.19; 93 % of their inverses score below this."""


def polarity_score(pixels: NDArray[np.generic]) -> float:
    """How well a film agrees with dark lungs beside a bright midline: a correlation, -1..1; an inverted film has the opposite sign.

    Grey values are replaced by their ranks, so that exposure, window and black borders weigh little.

    Parameters
    ----------
    pixels
        [H, W] uint8 or uint16.
    """
    # Every nth pixel of a large film: no copy of it in floats.
    step = max(1, min(pixels.shape) // _MAX_SIDE_PX)
    pixels = pixels[::step, ::step]
    small = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize((GRID, GRID), Image.Resampling.BOX))
    _, place, counts = np.unique(small, return_inverse=True, return_counts=True)
    # Equal greys (a black border) share the mean of their ranks: the order in which they are stored must not count.
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(GRID, GRID)]
    ranks = ranks - ranks.mean()
    length = float(np.linalg.norm(ranks))
    return float((ranks * _template()).sum() / length) if length > 0 else 0.0


def is_inverted(pixels: NDArray[np.generic]) -> bool:
    """True where a film is clearly shown inverted; false where it is not, or where it cannot be told."""
    return polarity_score(pixels) < INVERTED_BELOW


@functools.cache
def _template() -> NDArray[np.float64]:
    """[GRID, GRID], mean 0, length 1: two dark lungs; bright midline, heart and upper abdomen. Drawn, not fitted."""
    y, x = (np.mgrid[0:GRID, 0:GRID] + 0.5) / GRID

    def blob(centre_x: float, centre_y: float, half_x: float, half_y: float) -> NDArray[np.float64]:
        flat_topped: NDArray[np.float64] = np.exp(-((((x - centre_x) / half_x) ** 2 + ((y - centre_y) / half_y) ** 2) ** 2))
        return flat_topped

    midline = 0.9 * np.exp(-(((x - 0.5) / 0.09) ** 4)) * (y < 0.75)
    chart = midline + blob(0.55, 0.62, 0.17, 0.14) + 0.7 * (y > 0.82) - blob(0.29, 0.42, 0.14, 0.25) - blob(0.71, 0.42, 0.14, 0.25)
    chart = chart - chart.mean()
    normed: NDArray[np.float64] = chart / np.linalg.norm(chart)
    return normed
