"""From the picture that a report speaks of back to the stored pixels of its DICOM file, which other systems show.

The picture is upright and has square pixels (`ssacl.data.geometry`); the file may be neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ssacl.data.geometry import upright
from ssacl.inference.report import Box

if TYPE_CHECKING:
    from pydicom import Dataset

_CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))
"""(x, y) of the corners of a picture: top left, top right, bottom left, bottom right."""


@dataclass(frozen=True)
class StoredFrame:
    """The stored matrix of a film, and how its picture was turned."""

    rows: int
    columns: int
    is_swapped: bool
    """The picture's x axis runs along the stored rows' direction of counting, downwards."""
    flip_x: bool
    """The picture's x axis runs against the stored axis that it lies on."""
    flip_y: bool

    @classmethod
    def of(cls, ds: Dataset) -> StoredFrame:
        """The frame of a frontal film, from its header."""
        # What `upright` makes of four numbered corners tells how it turns this film.
        seen = upright(np.arange(4, dtype=np.uint8).reshape(2, 2), ds, lateral=False)
        origin, right, down = (np.array(_CORNERS[int(seen[place])]) for place in ((0, 0), (0, 1), (1, 0)))
        x_axis, y_axis = right - origin, down - origin
        return cls(int(ds.Rows), int(ds.Columns), bool(x_axis[0] == 0), bool(x_axis.sum() < 0), bool(y_axis.sum() < 0))

    def box(self, box: Box, width_px: int, height_px: int) -> Box:
        """A box of the picture, `width_px` x `height_px`, in stored pixels, cut off at the film's edge."""
        xs = sorted(self._flipped(x / width_px, self.flip_x) for x in (box.x0, box.x1))
        ys = sorted(self._flipped(y / height_px, self.flip_y) for y in (box.y0, box.y1))
        if self.is_swapped:
            xs, ys = ys, xs
        return Box(xs[0] * self.columns, ys[0] * self.rows, xs[1] * self.columns, ys[1] * self.rows)

    def mask(self, region: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[rows, columns]: a region of the picture, sampled at any resolution, on the stored pixels (nearest sample)."""
        turned = region[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]
        stored = turned.T if self.is_swapped else turned
        down = ((np.arange(self.rows) + 0.5) * stored.shape[0] / self.rows).astype(int)
        across = ((np.arange(self.columns) + 0.5) * stored.shape[1] / self.columns).astype(int)
        return np.ascontiguousarray(stored[np.ix_(down, across)])

    @staticmethod
    def _flipped(share: float, flip: bool) -> float:
        share = min(max(share, 0.0), 1.0)
        return 1.0 - share if flip else share
