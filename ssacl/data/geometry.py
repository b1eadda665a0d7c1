"""How a film lies: square pixels and upright patients, from what the header says of them (PS3.3 C.7.6.3.1.7, C.7.6.1.1.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from ssacl.data.refusals import RefusedImageError
from ssacl.data.render import Grey

if TYPE_CHECKING:
    from pydicom import Dataset

_SQUARE_ENOUGH = 0.01
MAX_ASPECT = 4.0
"""Of a pixel. No detector is beyond it; a header that is does not know."""
_AXES = {"L": ("x", 1), "R": ("x", -1), "F": ("y", 1), "H": ("y", -1)}
_LATERAL_AXES = {"A": ("x", 1), "P": ("x", 1), "F": ("y", 1), "H": ("y", -1)}


def upright(pixels: Grey, ds: Dataset, *, lateral: bool) -> Grey:
    """The film with the patient's head up and, if frontal, the patient's left at the right of the picture.

    PatientOrientation says where rows and columns run to; "L", "F" is how a frontal film is read. A lateral film is turned head up and
    keeps the side that it faces. Where the header does not say, or says something else than one turn or flip, the film stays as it is.
    """
    try:
        rows_run_to, columns_run_to = (str(value).strip().upper()[:1] for value in ds.get("PatientOrientation") or ())
        axes = _LATERAL_AXES if lateral else _AXES
        (row_axis, row_sign), (column_axis, column_sign) = axes[rows_run_to], axes[columns_run_to]
    except (ValueError, TypeError, KeyError):
        return pixels
    if {row_axis, column_axis} != {"x", "y"}:
        return pixels
    if row_axis == "y":
        row_sign, column_sign = column_sign, row_sign
    turned = pixels.T if row_axis == "y" else pixels
    return cast(Grey, np.ascontiguousarray(turned[::column_sign, ::row_sign]))


def is_turned(ds: Dataset) -> bool:
    """Whether PatientOrientation has the rows run along the patient, so that height and width change places."""
    first = next(iter(ds.get("PatientOrientation") or ()), "")
    return str(first).strip().upper()[:1] in {"F", "H"}


def pixel_spacing(ds: Dataset) -> tuple[float, float] | None:
    """Millimetres between rows and between columns; of the detector where there is no calibrated one; None where neither is believable."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        pair = _pair(ds.get(keyword))
        if pair and max(pair) < 10:
            return pair
    return None


def pixel_aspect(ds: Dataset) -> float:
    """Height of a pixel / its width, from the spacing, else from PixelAspectRatio; 1 where neither is there.

    Raises
    ------
    RefusedImageError
        ("unreadable") The pixel would be longer than `MAX_ASPECT` times its width, or the other way.
    """
    pair = pixel_spacing(ds) or _pair(ds.get("PixelAspectRatio"))
    aspect = pair[0] / pair[1] if pair else 1.0
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        raise RefusedImageError("unreadable")
    return aspect


def squared(pixels: Grey, aspect: float, max_pixels: int) -> Grey:
    """The film with its longer pixel side resampled to the shorter one; as it is where both are equal within one per cent.

    Raises
    ------
    RefusedImageError
        ("too_large") It would have more than `max_pixels`.
    """
    if abs(aspect - 1) <= _SQUARE_ENOUGH:
        return pixels
    height, width = pixels.shape
    size = (width, round(height * aspect)) if aspect > 1 else (round(width / aspect), height)
    if size[0] * size[1] > max_pixels:
        raise RefusedImageError("too_large")
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    deep = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    resampled: Grey = np.clip(np.rint(deep), 0, 65535).astype(np.uint16)
    return resampled


def _pair(value: Any) -> tuple[float, float] | None:
    try:
        first, second = (float(each) for each in value or ())
    except (TypeError, ValueError):
        return None
    return (first, second) if first > 0 and second > 0 else None
