"""A film and a map on it, drawn: what every picture of evidence shares.

The film is shown as it is stored: the patient's right is on the viewer's left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssacl.inference.report import Box

BANNER = "PRELIMINARY, UNVERIFIED DRAFT - not for diagnosis"
COLOURS = ("#ff9f1c", "#2ec4b6", "#e71d6f", "#8ac926", "#4cc9f0", "#c77dff", "#ffd166", "#f4845f", "#90be6d", "#b8c0ff")
BACKGROUND, INK, FAINT = "#101418", "#f2f4f6", "#9aa4ae"
_MAX_SIDE_PX = 1024


def shown_film(pixels: NDArray[Any], longest_side_px: int = _MAX_SIDE_PX) -> NDArray[np.uint8]:
    """[h, w] uint8, the longer side at most `longest_side_px`."""
    values = np.asarray(pixels)
    if values.dtype != np.uint8:
        low, high = np.percentile(values, (0.5, 99.5))
        values = ((values.astype(np.float32) - low) / max(high - low, 1e-6) * 255).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(values)
    scale = min(1.0, longest_side_px / max(image.size))
    if scale < 1:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)
    return np.asarray(image)


def blend(film: NDArray[np.uint8], heat: NDArray[np.float32], opacity: float) -> NDArray[np.uint8]:
    """[h, w, 3] uint8: the map in colour over the film, transparent where it is dark, so that anatomy stays visible."""
    from matplotlib import colormaps

    colour = np.asarray(colormaps["inferno"](0.25 + 0.7 * heat))[..., :3]
    alpha = (opacity * heat.clip(0, 1) ** 0.8)[..., None]
    grey = film[..., None] / 255.0
    return np.asarray(((1 - alpha) * grey + alpha * colour) * 255).round().clip(0, 255).astype(np.uint8)


def draw_film(axes: Any, image: NDArray[np.uint8]) -> None:
    axes.set_anchor("N")
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, origin="upper", interpolation="bilinear")
    for x, side, align in ((0.02, "R", "left"), (0.98, "L", "right")):
        box = {"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.5}
        axes.text(x, 0.985, side, transform=axes.transAxes, color="white", fontsize=12, fontweight="bold", ha=align, va="top", bbox=box)


def draw_box(axes: Any, box: Box, index: int, scale: float, numbered: bool) -> None:
    from matplotlib.patches import Rectangle

    colour = COLOURS[index % len(COLOURS)]
    corner = (box.x0 * scale - 0.5, box.y0 * scale - 0.5)
    axes.add_patch(Rectangle(corner, (box.x1 - box.x0) * scale, (box.y1 - box.y0) * scale, fill=False, edgecolor=colour, linewidth=1.8))
    if numbered:
        style = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
        axes.text(corner[0] + 3, corner[1] + 3, str(index + 1), color="black", fontsize=9, fontweight="bold", va="top", bbox=style)


def printable(text: str) -> str:
    """Text that every font can draw: a model may emit any code point, and a missing glyph is a warning, not a picture."""
    return "".join(letter if " " <= letter <= "~" else ("?" if letter.isprintable() else " ") for letter in text).strip()
