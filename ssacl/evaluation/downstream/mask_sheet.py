"""A film with the outlines of what was drawn and of what was found."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion

from ssacl.data.transforms import Square

_SHEET_PX = 384
_DRAWN, _FOUND = (76, 201, 240), (255, 159, 28)


def mask_sheet_png(square: Square, found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> bytes:
    """PNG of the square with the outlines of masks [structures, S, S]: blue as drawn, orange as found."""
    grey = Image.fromarray((square * 255).round().astype(np.uint8)).resize((_SHEET_PX, _SHEET_PX), Image.Resampling.BILINEAR)
    picture = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    for masks, colour in ((truth, _DRAWN), (found, _FOUND)):
        for mask in masks:
            large = np.asarray(Image.fromarray(mask).resize((_SHEET_PX, _SHEET_PX), Image.Resampling.NEAREST))
            picture[large & ~binary_erosion(large, iterations=2)] = colour
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="PNG")
    return content.getvalue()
