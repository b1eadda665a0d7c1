"""The phantom's patient: body proportions, pose on the film, and the anatomy that follows from them.

Everything is stated in patient coordinates (u, v): u grows to the right of the picture, which is the patient's left; v grows
downward; the thorax is about 2 wide and 1.9 high around (0, 0). A pose (rotation, scale, shift) puts the patient on the film.
Shape letters: S picture side in pixels; sides are -1 (patient's right) and +1 (patient's left).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]

RIGHT, LEFT = -1, 1
BASE_SCALE = 0.65
"""Half the thorax width in half-widths of the film, at scale 1."""
ZONE_ENDS = {"apical zone": (0.0, 0.2), "upper lung zone": (0.2, 0.5), "mid lung zone": (0.5, 0.76), "lower lung zone": (0.76, 1.35)}
"""Lung zones as shares of the way from the lung's top (0) to the top of its hemidiaphragm (1)."""


@dataclass(frozen=True)
class Body:
    """One patient's proportions, in patient coordinates (see module)."""

    half_width: float
    height: float
    fat: float
    heart_ratio: float
    """Cardiothoracic ratio: heart width over thorax width."""
    mediastinum: float
    """Width of the upper mediastinum, 1 is usual."""
    dome_right: float
    dome_left: float
    """v of the top of each hemidiaphragm."""
    knob: float
    rib_spacing: float
    rib_slope: float
    scoliosis: float
    clavicle_tilt: float
    female: bool

    def dome(self, side: int) -> float:
        return self.dome_left if side == LEFT else self.dome_right

    @property
    def top(self) -> float:
        """v of the lung apices."""
        return -0.98 * self.height

    @property
    def bottom(self) -> float:
        """v at which the rib cage is widest."""
        return 0.85 * self.height


@dataclass(frozen=True)
class Pose:
    """How the patient lies on the film."""

    angle: float
    """In-plane rotation, radians, clockwise in the picture."""
    scale: float
    shift_x: float
    shift_y: float
    """Shift in half-widths of the film."""
    turn: float
    """Rotation of the patient about the body's axis: moves front structures against the spine, in patient coordinates."""


def draw_body(rng: np.random.Generator) -> Body:
    """Proportions of a patient without findings."""
    habitus = float(rng.uniform(-1, 1))
    height = float(np.exp(rng.uniform(-0.15, 0.15) - 0.05 * habitus))
    dome = 0.5 * height + float(rng.uniform(-0.12, 0.12))
    return Body(
        half_width=float(np.exp(rng.uniform(-0.12, 0.12) + 0.05 * habitus)),
        height=height,
        fat=0.1 + 0.09 * (habitus + 1) * float(rng.uniform(0.6, 1.2)),
        heart_ratio=float(rng.uniform(0.38, 0.45)),
        mediastinum=float(rng.uniform(0.85, 1.12)),
        dome_right=dome - 0.03 + float(rng.uniform(-0.04, 0.03)),
        dome_left=dome + 0.04 + float(rng.uniform(-0.05, 0.05)),
        knob=float(rng.uniform(0.75, 1.25)),
        rib_spacing=0.158 * height * float(rng.uniform(0.93, 1.07)),
        rib_slope=float(rng.uniform(0.25, 0.5)),
        scoliosis=float(rng.normal(0, 0.03)),
        clavicle_tilt=float(rng.uniform(0.05, 0.28)),
        female=bool(rng.random() < 0.5),
    )


def draw_pose(rng: np.random.Generator, view: str) -> Pose:
    """A pose: +-14 degrees, e^+-0.25, shift at least +-0.28 half-widths (more where the film has room); AP films turn more."""
    scale = math.exp(rng.uniform(-0.25, 0.25))
    reach = min(max(1.04 - BASE_SCALE * scale, 0.28), 0.5)
    return Pose(
        angle=math.radians(rng.uniform(-14, 14)),
        scale=scale,
        shift_x=float(rng.uniform(-reach, reach)),
        # The chest stands a little high in patient coordinates: the apices end at -0.98, the angles at 0.8.
        shift_y=float(rng.uniform(-reach, reach)) + 0.04,
        turn=float(np.clip(rng.normal(0, 0.07 if view == "AP" else 0.04), -0.14, 0.14)),
    )


class Frame:
    """Patient coordinates of every pixel, and the way back.

    Attributes
    ----------
    u, v : [S, S] float32
    px : float
        Size of a pixel in patient coordinates.
    """

    def __init__(self, pose: Pose, size_px: int) -> None:
        self.size_px = size_px
        self._scale = BASE_SCALE * pose.scale
        self._cos, self._sin = math.cos(pose.angle), math.sin(pose.angle)
        self._shift = (pose.shift_x, pose.shift_y)
        axis = ((np.arange(size_px, dtype=np.float32) + 0.5) * (2 / size_px) - 1).astype(np.float32)
        x, y = (axis - np.float32(pose.shift_x))[None, :], (axis - np.float32(pose.shift_y))[:, None]
        cos, sin = np.float32(self._cos / self._scale), np.float32(self._sin / self._scale)
        self.u: Field = x * cos + y * sin
        self.v: Field = y * cos - x * sin
        self.px = 2 / size_px / self._scale

    def to_pixels(self, points: Any) -> NDArray[np.float64]:
        """Patient points [..., 2] (u, v) -> pixel positions [..., 2] (x right, y down); pixel centres lie at +0.5."""
        uv = np.asarray(points, dtype=np.float64)
        x = (uv[..., 0] * self._cos - uv[..., 1] * self._sin) * self._scale + self._shift[0]
        y = (uv[..., 0] * self._sin + uv[..., 1] * self._cos) * self._scale + self._shift[1]
        return (np.stack([x, y], axis=-1) + 1) * (self.size_px / 2)


class Anatomy:
    """Borders of the organs of one posed patient, as fields over the film and as functions of (u, v).

    Fields are signed distances in patient coordinates (roughly): positive inside the organ.
    """

    def __init__(self, body: Body, pose: Pose, frame: Frame) -> None:
        self.body, self.pose, self.frame = body, pose, frame
        self.u, self.v = frame.u, frame.v
        # Front structures move by `turn`; the middle of the lungs by half of it; the spine stays.
        self.front_u: Field = self.u - np.float32(pose.turn)
        self.carina = (0.3 * pose.turn, -0.27 * body.height)
        self.hila = {
            RIGHT: (-0.27 * body.mediastinum**0.5 + 0.5 * pose.turn, -0.03 * body.height),
            LEFT: (0.28 * body.mediastinum**0.5 + 0.5 * pose.turn, -0.09 * body.height),
        }
        # A large heart grows to the patient's left and down.
        growth = body.heart_ratio - 0.42
        self.heart_centre = (0.15 + 0.28 * growth + pose.turn, 0.3 * body.height + 0.05 * growth)
        self.heart_radii = (1.06 * body.heart_ratio * body.half_width, 0.31 * body.height * (1 + 0.9 * growth))
        self.atrium_centre = (-0.14 - 0.3 * growth + pose.turn, 0.25 * body.height)
        self.atrium_radii = (0.15 + 0.3 * growth, 0.25 * body.height)
        self.knob_centre = (0.15 * body.mediastinum + 0.7 * pose.turn, -0.4 * body.height)
        self.junction = (-0.17 + pose.turn, 0.03 * body.height)

    def lateral(self, v: Any) -> Any:
        """Half-width of the rib cage's inside at height v (scalar or field)."""
        body = self.body
        q = 1 - np.clip((v - np.float32(body.top)) / np.float32(body.bottom - body.top), 0, 1)
        return np.float32(body.half_width) * np.sqrt(1 - q * q * np.sqrt(q))

    def medial(self, v: Any, side: int) -> Any:
        """Distance of the lung's inner border from u = 0 at height v, heart aside."""
        body = self.body
        width = np.float32(0.15 * body.mediastinum + side * 0.6 * self.pose.turn)
        flare = 0.24 * np.exp((np.float32(body.top) - v) * np.float32(14))
        if side == LEFT:
            knob = np.float32(0.07 * body.knob * body.mediastinum) * bump((v - self.knob_centre[1]) / 0.19)
            trunk = 0.05 * bump((v + 0.12 * body.height) / 0.22)
            return width + flare + knob + trunk
        return width + flare + 0.03 * bump((v + 0.05) / 0.3)

    def diaphragm(self, u: Any, side: int) -> Any:
        """v of the hemidiaphragm's surface at u."""
        x = (side * u / np.float32(self.body.half_width) - np.float32(0.46)) / np.float32(0.5)
        return np.float32(self.body.dome(side)) + np.float32(0.25) * x * x

    @cached_property
    def cage(self) -> Field:
        """Inside of the rib cage, both sides and the middle: [S, S]."""
        distance: Field = np.minimum(self.lateral_here - np.abs(self.u), self.v - np.float32(self.body.top))
        return distance

    @cached_property
    def lateral_here(self) -> Field:
        field: Field = self.lateral(self.v)
        return field

    @cached_property
    def lungs(self) -> dict[int, Field]:
        """Each lung (air space, heart not cut out): side -> [S, S]."""
        result = {}
        for side in (RIGHT, LEFT):
            outward = self.u if side == LEFT else -self.u
            distance = np.minimum(outward - self.medial(self.v, side), self.lateral_here - outward)
            result[side] = np.minimum(distance, self.diaphragm_here[side] - self.v).astype(np.float32)
        return result

    @cached_property
    def diaphragm_here(self) -> dict[int, Field]:
        return {side: self.diaphragm(self.u, side) for side in (RIGHT, LEFT)}

    @cached_property
    def ventricles(self) -> Field:
        """The heart without its right border: a tilted ellipse, apex down and to the patient's left."""
        return self.ellipse(self.heart_centre, self.heart_radii, math.radians(24))

    @cached_property
    def atrium(self) -> Field:
        return self.ellipse(self.atrium_centre, self.atrium_radii)

    @cached_property
    def heart(self) -> Field:
        field: Field = np.maximum(self.ventricles, self.atrium)
        return field

    def spine_u(self, v: Any) -> Any:
        """u of the spine's axis at height v."""
        return np.float32(self.body.scoliosis) * np.sin(np.float32(2.2) * v)

    def trachea_u(self, v: Any) -> Any:
        """u of the trachea's axis at height v."""
        return np.float32(self.carina[0]) + np.float32(0.12 * self.pose.turn) * (v - np.float32(self.carina[1]))

    def clavicle(self, side: int) -> tuple[Field, Field]:
        """(distance inside the bone, share 0..1 of the way from its inner to its outer end), both [S, S]."""
        along = (side * self.front_u - 0.11) / 0.86
        distance = np.float32(0.048) - np.abs(self.v - self.clavicle_v(along))
        distance = np.minimum(distance, 0.86 * np.minimum(along, 1 - along))
        return distance.astype(np.float32), along

    def clavicle_v(self, along: Any) -> Any:
        """v of a clavicle's axis at a share of its length."""
        body = self.body
        return np.float32(body.top + 0.27) - np.float32(body.clavicle_tilt) * along + 0.035 * np.sin(2 * np.pi * along)

    def lung_share(self, side: int) -> Field:
        """Way from the lung's top (0) to the top of its hemidiaphragm (1): [S, S]."""
        share: Field = (self.v - np.float32(self.body.top)) / np.float32(self.body.dome(side) - self.body.top)
        return share

    def zone_point(self, side: int, zone: str, across: float, along: float) -> tuple[float, float]:
        """A point of a lung zone: `across` 0..1 from its inner to its outer border, `along` 0..1 from its top to its bottom."""
        start, end = ZONE_ENDS[zone]
        v = self.body.top + (start + (min(end, 1.05) - start) * along) * (self.body.dome(side) - self.body.top)
        inner, outer = float(self.medial(v, side)), float(self.lateral(v))
        if side == LEFT and zone == "lower lung zone":
            inner = max(inner, min(self.heart_centre[0] + 0.75 * self.heart_radii[0], 0.7 * outer))
        return side * (inner + (outer - inner) * across), v

    def angle_point(self, side: int) -> tuple[float, float]:
        """The costophrenic angle's tip."""
        u = 0.93 * self.body.half_width
        return side * u, float(self.diaphragm(np.float32(side * u), side))

    def ellipse(self, centre: tuple[float, float], radii: tuple[float, float], tilt: float = 0.0) -> Field:
        """Signed distance (rough) to an ellipse's edge, positive inside: [S, S]."""
        du, dv = self.u - np.float32(centre[0]), self.v - np.float32(centre[1])
        if tilt:
            cos, sin = np.float32(math.cos(tilt)), np.float32(math.sin(tilt))
            du, dv = du * cos + dv * sin, dv * cos - du * sin
        du /= np.float32(radii[0])
        dv /= np.float32(radii[1])
        field: Field = (1 - np.sqrt(du * du + dv * dv)) * np.float32(min(radii))
        return field


def bump(x: Any) -> Any:
    """A smooth hump: 1 at 0, 0 beyond +-1."""
    inside = np.clip(1 - x * x, 0, None)
    return inside * inside


def soft(distance: Field, width: float) -> Field:
    """Signed distance -> coverage 0..1 over an edge `width` wide."""
    field: Field = np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)
    return field
