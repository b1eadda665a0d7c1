"""Pictures in and out of the model's square: fit, normalise, augment, mirror.

The longest side is fitted into the square, the rest padded with black, centred. Nothing here knows labels or words; the flip that keeps
laterality true is put together in `collate`.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssacl.config import AugmentConfig
from ssacl.data.records import Sample
from ssacl.errors import ImageError

MEAN, STD = 0.4978, 0.2449
"""Of the 0..1 picture (METHOD section 2)."""
Square = NDArray[np.float32]
"""[S, S] float32 in 0..1."""


@dataclass(frozen=True)
class SquareFit:
    """How a picture lies in the model's square. Coordinates are continuous: pixel (column x, row y) covers [x, x+1) x [y, y+1)."""

    width_px: int
    """Of the picture before the fit."""
    height_px: int
    size_px: int
    """Side of the square."""
    scale_x: float
    """Square pixels per picture pixel; differs from `scale_y` by rounding only."""
    scale_y: float
    offset_x: int
    """Columns of padding on the left."""
    offset_y: int

    def to_square(self, x: float, y: float) -> tuple[float, float]:
        """A point of the picture, in the square."""
        return x * self.scale_x + self.offset_x, y * self.scale_y + self.offset_y

    def to_original(self, x: float, y: float) -> tuple[float, float]:
        """A point of the square, in the picture; points in the padding come out outside of it."""
        return (x - self.offset_x) / self.scale_x, (y - self.offset_y) / self.scale_y

    def grid_to_original(self, grid: NDArray[np.float32]) -> NDArray[np.float32]:
        """A [g, g] map over the square -> [H, W] over the picture: bilinear between cell centres, padding cut off."""
        rows = _interpolation(self.height_px, self.scale_y, self.offset_y, self.size_px, grid.shape[0])
        columns = _interpolation(self.width_px, self.scale_x, self.offset_x, self.size_px, grid.shape[1])
        return np.asarray(rows @ grid.astype(np.float32) @ columns.T, dtype=np.float32)


def _interpolation(length: int, scale: float, offset: int, size_px: int, cells: int) -> NDArray[np.float32]:
    """[length, cells] weights of the two nearest cells for every picture row (or column)."""
    at = np.clip(((np.arange(length) + 0.5) * scale + offset) * cells / size_px - 0.5, 0, cells - 1)
    low = np.minimum(at.astype(np.int64), max(cells - 2, 0))
    weights = np.zeros((length, cells), dtype=np.float32)
    weights[np.arange(length), np.minimum(low + 1, cells - 1)] = at - low
    weights[np.arange(length), low] += 1 - (at - low)
    return weights


def fit_of(width_px: int, height_px: int, size_px: int) -> SquareFit:
    """The fit of a picture of this size, without touching pixels."""
    scale = size_px / max(width_px, height_px)
    width, height = max(1, round(width_px * scale)), max(1, round(height_px * scale))
    return SquareFit(width_px, height_px, size_px, width / width_px, height / height_px, (size_px - width) // 2, (size_px - height) // 2)


def load_square(source: Sample | NDArray[np.uint8] | NDArray[np.uint16], size_px: int) -> tuple[Square, SquareFit]:
    """Decode (a shard sample) or take (grey pixels [H, W] uint8 or uint16, full range) a picture and fit it into the square.

    The fit of a sample speaks of the stored picture's pixels.

    Raises
    ------
    ImageError
        The bytes are no whole picture, or the array is not grey uint8 or uint16.
    """
    if isinstance(source, Sample):
        image, fit = _decode(source, size_px)
    else:
        if source.ndim != 2 or source.dtype not in (np.uint8, np.uint16) or 0 in source.shape:
            raise ImageError(f"A picture of shape {source.shape} and type {source.dtype} came; expected grey [H, W] uint8 or uint16.")
        fit = fit_of(source.shape[1], source.shape[0], size_px)
        image = Image.fromarray(source) if source.dtype == np.uint8 else _from_deep(source)
    width, height = round(fit.width_px * fit.scale_x), round(fit.height_px * fit.scale_y)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=None)
    square = np.zeros((size_px, size_px), dtype=np.float32)
    inside = np.asarray(image, dtype=np.float32) / np.float32(255)
    square[fit.offset_y : fit.offset_y + height, fit.offset_x : fit.offset_x + width] = inside
    return square, fit


def _from_deep(pixels: NDArray[Any]) -> Image.Image:
    # Pillow resizes 16-bit pictures as floats only.
    return Image.fromarray(pixels.astype(np.float32) * np.float32(255 / 65535))


def _decode(sample: Sample, size_px: int) -> tuple[Image.Image, SquareFit]:
    try:
        with Image.open(io.BytesIO(sample.image), formats=("JPEG", "PNG")) as image:
            fit = fit_of(image.width, image.height, size_px)
            # JPEG only: decodes at 1/2, 1/4 or 1/8 where that is still at least the target's size.
            image.draft("L", (math.ceil(image.width * fit.scale_x), math.ceil(image.height * fit.scale_y)))
            image.load()
            if image.mode == "L":
                return image.copy(), fit
            if image.mode in ("I;16", "I;16B", "I"):
                return _from_deep(np.asarray(image)), fit
            return image.convert("L"), fit
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"The picture of sample {sample.key} cannot be decoded ({type(error).__name__}); run `ssacl data verify`."
        ) from error


def normalise(square: Square) -> NDArray[np.float32]:
    """[S, S] 0..1 -> [3, S, S] float32, mean and deviation removed, grey repeated."""
    return np.repeat(((square - np.float32(MEAN)) / np.float32(STD))[None], 3, axis=0)


def mirror(square: Square) -> Square:
    """Left and right exchanged."""
    return np.ascontiguousarray(square[:, ::-1])


def augment(square: Square, config: AugmentConfig, rng: np.random.Generator) -> Square:
    """Random rotation, scale, shift, contrast and brightness; black comes in from outside. Never flips."""
    angle = math.radians(rng.uniform(-config.rotate_deg, config.rotate_deg))
    scale = rng.uniform(*config.scale)
    shift_x, shift_y = rng.uniform(-config.shift, config.shift, 2) * square.shape[0]
    contrast, brightness = rng.uniform(-config.brightness, config.brightness, 2)
    if angle or scale != 1 or shift_x or shift_y:
        # PIL wants the inverse: from a place in the new picture to one in the old, about the centre.
        cosine, sine, centre = math.cos(angle) / scale, math.sin(angle) / scale, square.shape[0] / 2
        x, y = centre + shift_x, centre + shift_y
        inverse = (cosine, sine, centre - cosine * x - sine * y, -sine, cosine, centre + sine * x - cosine * y)
        moved = Image.fromarray(square).transform(
            (square.shape[1], square.shape[0]), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR
        )
        square = np.asarray(moved, dtype=np.float32)
    if contrast or brightness:
        square = np.clip((square - np.float32(0.5)) * np.float32(1 + contrast) + np.float32(0.5 + brightness), 0, 1)
    return square
