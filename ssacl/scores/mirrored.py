"""Films turned left to right, and whether maps turn with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import TWIN_NODES
from ssacl.data.dicom import Picture
from ssacl.scores.map_measures import HIT_RADIUS

TOLERANCE = 2 * HIT_RADIUS
"""Half-widths by which two centroids may differ: the radius within which a pointing map hits."""


def mirror_picture(picture: Picture) -> Picture:
    """The film turned left to right."""
    turned: Any = np.ascontiguousarray(picture.pixels[:, ::-1])
    return dataclasses.replace(picture, pixels=turned)


def twins_agree(plain: NDArray[np.float64], turned: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which nodes lie on the mirrored film where their twins on the plain one are mirrored to; centroids [G, 2] in half-widths."""
    agree: NDArray[np.bool_] = np.linalg.norm(turned - plain[list(TWIN_NODES)] * (-1, 1), axis=1) <= TOLERANCE
    return agree
