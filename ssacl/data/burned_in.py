"""Text burned into a film: a cheap detector, and a way to blank what it finds.

It looks for lines of small, sharp-edged strokes, as annotation software draws them. It does not read. A line of fewer than about four
letters (a side marker) is left; text that is fainter, larger or handwritten is missed, and wires or a grid may be taken for text. It helps
to find films that need a look, and is no proof that a film carries none. Figures: docs/DATA.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ssacl.data.render import Grey

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside."""
_SIDE_PX = 768
_CELL_PX = 8
_EDGE = 50
"""Grey levels from one pixel to the next."""
_MIN_EDGES = 3
"""Of each direction in a cell: rising and falling, across and down."""
_MIN_CELLS = 3


def text_boxes(pixels: Grey) -> list[Box]:
    """Where lines of burned-in text seem to be, top to bottom, with a margin around them.

    Parameters
    ----------
    pixels
        [H, W] uint8 or uint16, as shown.
    """
    height, width = pixels.shape
    scale = min(1.0, _SIDE_PX / max(height, width))
    grey = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    image = Image.fromarray(grey)
    if scale < 1:
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX, reducing_gap=1.0)
    small = np.asarray(image, dtype=np.int16)
    across, down = np.diff(small, axis=1), np.diff(small, axis=0)
    shape = (small.shape[0] // _CELL_PX, small.shape[1] // _CELL_PX)
    edges = (across > _EDGE, across < -_EDGE, down > _EDGE, down < -_EDGE)
    fewest = np.min([_per_cell(each, shape) for each in edges], axis=0)
    dense = fewest >= _MIN_EDGES
    if not dense.any():
        return []
    # Thin letters and the space between two words do not end a line that dense ones make certain.
    strokes = ndimage.binary_closing(np.pad(fewest >= 1, 3), np.ones((1, 5)))[3:-3, 3:-3]
    lines, count = ndimage.label(strokes)
    boxes = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(lines, count), start=1):
        is_wide = columns.stop - columns.start >= max(_MIN_CELLS, rows.stop - rows.start)
        if is_wide and int(dense[lines == number].sum()) >= _MIN_CELLS:
            left, top = (columns.start - 1) * _CELL_PX, (rows.start - 1) * _CELL_PX
            right, bottom = (columns.stop + 1) * _CELL_PX, (rows.stop + 1) * _CELL_PX
            corners = (
                max(0, int(left / scale)),
                max(0, int(top / scale)),
                min(width, int(right / scale)),
                min(height, int(bottom / scale)),
            )
            boxes.append(corners)
    return sorted(boxes, key=lambda box: (box[1], box[0]))


def blanked(pixels: Grey, boxes: list[Box]) -> Grey:
    """A copy with every box filled by the median grey of its frame, which hides less than black does when a box was no text."""
    filled = pixels.copy()
    for left, top, right, bottom in boxes:
        box = pixels[top:bottom, left:right]
        frame = np.concatenate([box[0], box[-1], box[:, 0], box[:, -1]])
        filled[top:bottom, left:right] = np.median(frame).astype(pixels.dtype)
    return filled


def _per_cell(edges: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.int64]:
    rows, columns = shape
    padded = np.zeros((rows * _CELL_PX, columns * _CELL_PX), dtype=bool)
    part = edges[: padded.shape[0], : padded.shape[1]]
    padded[: part.shape[0], : part.shape[1]] = part
    counts: NDArray[np.int64] = padded.reshape(rows, _CELL_PX, columns, _CELL_PX).sum(axis=(1, 3))
    return counts
