"""Plain, affine, crop: the poses in which a film is asked (METHOD section 8). Image, masks and points move together.

Everything lives on the model's square, the film padded and centred, [-1, 1]^2 with x right and y down; a *pose* says where its points go.

plain    as filmed
affine   random shift of +-0.2 half-widths, scale e^+-0.2, rotation of +-10 degrees; what comes in from outside is black
crop     a square window of 0.68 to 0.85 of the square's side, wholly inside the film, so that no frame is visible
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ssacl.data.transforms import Square, fit_of
from ssacl.losses.warp import PADDING_ZEROS, warp_images

CONDITIONS = ("plain", "affine", "crop")
SHIFT, LOG_SCALE, ROTATION_DEG = 0.2, 0.2, 10.0
CROP = (0.68, 0.85)


@dataclass(frozen=True)
class Pose:
    """What stands at p moves to e^log_scale R(angle) p + shift."""

    angle: float = 0.0
    log_scale: float = 0.0
    shift_x: float = 0.0
    shift_y: float = 0.0

    @property
    def is_identity(self) -> bool:
        return self == Pose()

    def moved(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """[..., 2] where points of the square go; they may leave it."""
        cos, sin = (math.exp(self.log_scale) * part(self.angle) for part in (math.cos, math.sin))
        turned = np.asarray(points, dtype=np.float64) @ np.array([[cos, sin], [-sin, cos]])
        return np.asarray(turned + np.array([self.shift_x, self.shift_y]))

    def moved_image(self, square: Square) -> Square:
        """[S, S] float32, bilinear, black outside of the old square."""
        if self.is_identity:
            return square
        warp = torch.tensor([[self.angle, self.log_scale, self.shift_x, self.shift_y]])
        stack = torch.from_numpy(np.array(square, dtype=np.float32))[None, None]
        moved: Square = warp_images(stack, warp, torch.tensor([PADDING_ZEROS]), black=0.0)[0, 0].numpy()
        return moved

    def moved_mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[S, S] bool: where the moved mask covers at least half of a pixel."""
        return mask if self.is_identity else self.moved_image(mask.astype(np.float32)) >= 0.5


def pose_of(condition: str, key: str, width_px: int, height_px: int, seed: int = 0) -> Pose:
    """The pose of a film in a condition: a function of the seed, the film's `key` and the condition alone."""
    if condition == "plain":
        return Pose()
    digest = hashlib.sha256(f"{seed}/{condition}/{key}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    if condition == "affine":
        angle, log_scale, x, y = random.uniform(-1, 1, 4) * (math.radians(ROTATION_DEG), LOG_SCALE, SHIFT, SHIFT)
        return Pose(float(angle), float(log_scale), float(x), float(y))
    # Half sides of film and window, as shares of the square's half side.
    fit = fit_of(width_px, height_px, 1000)
    half_film = np.array([width_px * fit.scale_x, height_px * fit.scale_y]) / 1000
    half_window = min(float(random.uniform(*CROP)), *half_film)
    centre = random.uniform(-1, 1, 2) * (half_film - half_window)
    x, y = -centre / half_window
    return Pose(0.0, -math.log(half_window), float(x), float(y))
