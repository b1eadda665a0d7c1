"""Twelve landmarks of the lungs, from their masks and from a model's leaves (METHOD section 8).

Per lung: the apex, the centroids of its upper, middle and lower third (of its height), the costophrenic corner and the dome of the
diaphragm. Coordinates are half-widths of the square, x right and y down; the patient's right lung lies at the left of the image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import NODE_INDEX, SIDES

_LEAF_OF = {
    "apex": "apical zone",
    "upper third": "upper lung zone",
    "middle third": "mid lung zone",
    "lower third": "lower lung zone",
    "costophrenic corner": "costophrenic angle",
    "dome": "hemidiaphragm",
}
LANDMARKS: tuple[str, ...] = tuple(f"{side} {name}" for side in SIDES for name in _LEAF_OF)
"""The twelve, the right lung's first."""
LANDMARK_NODES: tuple[int, ...] = tuple(NODE_INDEX[f"{side} {leaf}"] for side in SIDES for leaf in _LEAF_OF.values())
"""Per landmark, the index (in `NODES`) of the leaf whose map's centroid stands for it."""


def lung_landmarks(right: NDArray[np.bool_], left: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[12, 2] landmarks of two lung masks [S, S]; not a number for a lung without pixels.

    The apex is the middle of the lung's highest row. The costophrenic corner is the lung's pixel that lies furthest down and away from
    the other lung (the largest sum of both). The dome is the highest point of the lung's lower edge in the middle half of its width.
    """
    return np.concatenate([_one_lung(right, outward=-1.0), _one_lung(left, outward=1.0)])


def _one_lung(mask: NDArray[np.bool_], outward: float) -> NDArray[np.float64]:
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return np.full((len(_LEAF_OF), 2), np.nan)
    apex = (columns[rows == rows.min()].mean(), float(rows.min()))
    top, height = rows.min(), rows.max() - rows.min() + 1
    third = np.minimum((rows - top) * 3 // height, 2)
    # A lung in several parts may have an empty third: its middle then lies between its ends.
    thirds = [
        (columns[third == part].mean(), rows[third == part].mean())
        if (third == part).any()
        else (columns.mean(), top + height * (part + 0.5) / 3)
        for part in range(3)
    ]
    corner = int(np.argmax(rows + outward * columns))
    first, width = columns.min(), columns.max() - columns.min() + 1
    base = np.array([rows[columns == column].max() if (columns == column).any() else -1 for column in range(first, first + width)])
    middle = np.arange(width // 4, max(width - width // 4, width // 4 + 1))
    lower_edge = np.where(base[middle] >= 0, base[middle], rows.max())
    dome = int(np.argmin(lower_edge))
    points = [apex, *thirds, (float(columns[corner]), float(rows[corner])), (float(first + middle[dome]), float(lower_edge[dome]))]
    return np.asarray((np.array(points, dtype=np.float64) * 2 + 1) / mask.shape[0] - 1)
