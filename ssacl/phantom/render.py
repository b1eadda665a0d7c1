"""The phantom's picture: attenuation of the posed patient, painted organ by organ, then exposed.

Densities are in arbitrary units of attenuation: aerated lung about 0.3, soft tissue 0.9, bone on top of it 0.2.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from ssacl.phantom.geometry import LEFT, RIGHT, Anatomy, Field, bump, soft

_OVERSAMPLING = 2


class Scene:
    """What the findings may change before the picture is exposed.

    Attributes
    ----------
    extra : [S, S] float32
        Density that findings add or remove.
    vessels : [S, S] float32
        Density of the lung's vessels; a pneumothorax wipes it out.
    rib_shift : [S, S] float32 or None
        Displacement of the ribs in units of their spacing (fractures).
    clavicle_steps : side -> (share of its length, step in patient coordinates)
    """

    def __init__(self, anatomy: Anatomy, rng: np.random.Generator) -> None:
        self.anatomy = anatomy
        self.rng = rng
        size_px = anatomy.frame.size_px
        self.extra: Field = np.zeros((size_px, size_px), dtype=np.float32)
        self.vessels: Field = draw_vessels(anatomy, rng)
        self.rib_shift: Field | None = None
        self.clavicle_steps: dict[int, tuple[float, float]] = {}

    def noise(self, cells: int) -> Field:
        """Smooth noise of zero mean and about unit deviation, with `cells` bumps across the film: [S, S]."""
        return smooth_noise(self.rng, cells, self.anatomy.frame.size_px)


def smooth_noise(rng: np.random.Generator, cells: int, size_px: int) -> Field:
    """Smooth noise of zero mean and about unit deviation, with `cells` bumps across the film: [S, S]."""
    coarse = rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    smooth = np.asarray(Image.fromarray(coarse).resize((size_px, size_px), Image.Resampling.BICUBIC))
    return smooth * np.float32(1.35)


def expose(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint16]:
    """The picture as a detector of 12 bits gives it, bone white: [S, S] uint16, 0..4095.

    `rng` decides on exposure and grain alone: the same patient with and without a finding can be exposed alike.
    """
    anatomy = scene.anatomy
    density = _soft_tissue(scene, rng) + scene.extra
    density += _bones(scene)
    np.clip(density, 0, None, out=density)
    picture = 1 - np.exp(density * np.float32(-rng.uniform(0.95, 1.25)))
    px = anatomy.frame.size_px / 256
    picture = ndimage.gaussian_filter(picture, float(rng.uniform(0.45, 0.75)) * px, truncate=2.5)
    # Exposure: a faint slope over the film (heel effect), film gamma, brightness, and quantum noise.
    slope = rng.uniform(-0.05, 0.05, size=2).astype(np.float32)
    axis = np.linspace(-1, 1, anatomy.frame.size_px, dtype=np.float32)
    picture += slope[0] * axis[None, :] + slope[1] * axis[:, None]
    picture = np.clip((picture - 0.02) * np.float32(rng.uniform(1.02, 1.16)), 0, 1) ** np.float32(rng.uniform(0.85, 1.25))
    grain = rng.standard_normal(picture.shape, dtype=np.float32)
    picture += grain * np.float32(rng.uniform(0.008, 0.022))
    detector: NDArray[np.uint16] = (np.clip(picture, 0, 1) * 4095 + 0.5).astype(np.uint16)
    return detector


def draw_lines(anatomy: Anatomy, lines: list[tuple[list[tuple[float, float]], float, float]]) -> Field:
    """Polylines (patient points, width in patient coordinates, density) as coverage times density: [S, S] float32.

    Later lines cover earlier ones.
    """
    size = anatomy.frame.size_px * _OVERSAMPLING
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)
    every = anatomy.frame.to_pixels([point for points, _, _ in lines for point in points]) * _OVERSAMPLING
    first = 0
    for points, width, density in lines:
        where = every[first : first + len(points)].ravel().tolist()
        first += len(points)
        pixels = width / anatomy.frame.px * _OVERSAMPLING
        # A line thinner than a drawn pixel keeps its mass by being fainter.
        shade = round(255 * min(density, 1.0) * min(1.0, pixels))
        pen.line(where, fill=shade, width=max(1, round(pixels)), joint="curve" if pixels > 3 else None)
    return np.asarray(canvas.reduce(_OVERSAMPLING), dtype=np.float32) * np.float32(1 / 255)


def draw_vessels(anatomy: Anatomy, rng: np.random.Generator) -> Field:
    """Branching lung vessels from the hila outward, tapering: [S, S] float32 density."""
    branches: list[tuple[int, list[tuple[float, float]], float, float]] = []
    for side in (RIGHT, LEFT):
        hilum = anatomy.hila[side]
        for heading in np.linspace(-1.25, 1.35, 9):
            start = (hilum[0], hilum[1] + 0.05 * float(np.sin(heading)))
            _grow(branches, rng, start, float(heading) + float(rng.normal(0, 0.12)), side, 0.034, 0)
    branches.sort(key=lambda branch: -branch[0])
    return draw_lines(anatomy, [(points, width, density) for _, points, width, density in branches])


def _grow(
    branches: list[tuple[int, list[tuple[float, float]], float, float]],
    rng: np.random.Generator,
    start: tuple[float, float],
    heading: float,
    side: int,
    width: float,
    level: int,
) -> None:
    length = (0.26, 0.22, 0.2, 0.16)[level] * float(rng.uniform(0.7, 1.2))
    bend = float(rng.normal(0, 0.25))
    points = [start]
    for step in range(1, 3):
        angle = heading + bend * step / 2
        u, v = points[-1]
        points.append((u + side * math.cos(angle) * length / 2, v + math.sin(angle) * length / 2))
    branches.append((level, points, width, 0.2 * 0.78**level))
    if level < 3:
        for turn in (0.35, -0.35):
            _grow(branches, rng, points[-1], heading + bend + turn * float(rng.uniform(0.6, 1.5)), side, width * 0.66, level + 1)


def _soft_tissue(scene: Scene, rng: np.random.Generator) -> Field:
    anatomy = scene.anatomy
    body, u, v, px = anatomy.body, anatomy.u, anatomy.v, anatomy.frame.px
    edge = 2 * px
    density = _outline(anatomy, edge)
    air = soft(anatomy.lungs[RIGHT], edge) + soft(anatomy.lungs[LEFT], edge)
    depth = np.maximum(anatomy.lungs[RIGHT], anatomy.lungs[LEFT])
    density -= air * (0.5 + 0.16 * np.clip(depth * 3.5, 0, 1))
    heart = soft(anatomy.heart, 1.5 * edge)
    density += air * scene.vessels * (1 - 0.6 * heart)
    density += 0.55 * heart * air
    below = np.where(u > 0, anatomy.diaphragm_here[LEFT], anatomy.diaphragm_here[RIGHT])
    inside = np.abs(u) < body.half_width + 0.5 * body.fat
    density += 0.2 * np.clip((v - below) * 4, 0, 1) * inside
    for side in (RIGHT, LEFT):
        density += 0.16 * bump(np.clip(1 - anatomy.ellipse(anatomy.hila[side], (0.13, 0.19)) / 0.13, 0, 1)) * air
    middle = 1 - air
    density += (0.24 * middle) * bump(u / 0.5) * np.clip((v - np.float32(body.top - 0.1)) * 2, 0, 1)
    # Air in the trachea and the two main bronchi, and in the stomach.
    carina_v = anatomy.carina[1]
    tube = soft(0.052 - np.abs(u - anatomy.trachea_u(v)), 1.5 * edge) * (v < carina_v)
    density -= 0.42 * tube
    bronchi = [([anatomy.carina, (hilum[0] * 0.9, hilum[1] - 0.03)], 0.065, 0.26) for hilum in anatomy.hila.values()]
    density -= draw_lines(anatomy, bronchi)
    knob_u, knob_v = anatomy.knob_centre
    density += 0.2 * soft(anatomy.ellipse((knob_u, knob_v), (0.1 * body.knob, 0.1 * body.knob)), 2 * edge)
    bubble = anatomy.ellipse((0.42, body.dome_left + 0.15), (0.17, 0.085))
    density -= float(rng.uniform(0.15, 0.45)) * soft(bubble, 2 * edge)
    if body.female:
        for side in (RIGHT, LEFT):
            breast = anatomy.ellipse((side * 0.52, 0.42), (0.36, 0.3 + body.fat))
            density += (0.05 + 0.3 * body.fat) * soft(breast, 3 * edge)
    density += 0.025 * smooth_noise(rng, 18, anatomy.frame.size_px)
    return density.astype(np.float32)


def _outline(anatomy: Anatomy, edge: float) -> Field:
    """Soft tissue of trunk, neck and arms."""
    body, v = anatomy.body, anatomy.v
    across = np.abs(anatomy.u)
    width = body.half_width + 0.06 + body.fat
    beside = np.clip(across - 0.25, 0, None)
    shoulder_v = np.float32(body.top - 0.12) + 0.24 * beside - 0.22 * np.clip(1 - 3 * beside, 0, 1) ** 2
    arm_pit = np.clip((body.top + 0.5 - v) * 8, 0, 1)
    trunk = np.minimum(width + 0.4 * arm_pit - across, v - shoulder_v)
    neck = 0.27 + 0.4 * body.fat - across
    arm_u = np.float32(width + 0.27) + 0.1 * (v + np.float32(0.4))
    arm = np.minimum(0.15 - np.abs(across - arm_u), v - shoulder_v)
    thick = np.clip(np.maximum(trunk, neck) * 5, 0.35, 1)
    density: Field = (0.72 + 0.8 * body.fat) * thick * soft(np.maximum(trunk, neck), edge)
    np.maximum(density, 0.55 * soft(arm, edge), out=density)
    density += 0.25 * soft(0.05 - np.abs(across - arm_u), edge) * (arm > 0)
    return density


def _bones(scene: Scene) -> Field:
    anatomy = scene.anatomy
    body, u, v, px = anatomy.body, anatomy.u, anatomy.v, anatomy.frame.px
    edge = 2 * px
    # Ribs: behind, nearly level then down and outward; in front, fainter, steeply down toward the middle.
    x = np.abs(u) * np.float32(1 / body.half_width)
    behind = rib_phase(anatomy, x)
    front = (v - 0.55 * np.clip(1 - x, 0, None)) * np.float32(1 / (1.22 * body.rib_spacing)) + 0.3
    if scene.rib_shift is not None:
        behind = behind + scene.rib_shift
    cage = soft(anatomy.cage + 0.05, 0.06) * np.clip((body.dome_right + 0.34 - v) * 5, 0.0, 1)
    sharp = body.rib_spacing / (2.2 * edge)
    density = 0.3 * _band(behind, 0.2, sharp) * cage * (x > 0.1)
    density += 0.15 * _band(front, 0.21, sharp) * cage * np.clip((x - 0.42) * 6, 0, 1) * (v > body.top + 0.25)
    # Spine: a column with a bright rim, crossed by darker discs.
    off = np.abs(u - anatomy.spine_u(v))
    discs = 0.5 + 0.5 * np.cos(v * np.float32(2 * np.pi / (0.9 * body.rib_spacing)))
    column = soft(0.105 - off, edge)
    density += column * (0.08 + 0.13 * discs + 0.8 * np.clip(off - 0.07, 0, 1))
    for side in (RIGHT, LEFT):
        distance, along = anatomy.clavicle(side)
        step = scene.clavicle_steps.get(side)
        if step is not None:
            share, drop = step
            broken = np.float32(0.048) - np.abs(v - drop - anatomy.clavicle_v(along))
            broken = np.minimum(broken, 0.86 * np.minimum(along - (share + 0.06), 1 - along))
            distance = np.maximum(np.minimum(distance, 0.86 * (share - along)), broken)
        density += 0.5 * soft(distance, edge) * (0.75 + 6 * np.clip(0.03 - distance, 0, 0.04))
        head = anatomy.ellipse((side * (body.half_width + 0.16 + 0.5 * body.fat), body.top + 0.2), (0.15, 0.16))
        density += 0.25 * soft(head, edge)
    bones: Field = density.astype(np.float32)
    return bones


def rib_phase(anatomy: Anatomy, x: Field) -> Field:
    """Height in units of rib spacing along the posterior ribs: rib n lies around n + 0.5. `x` is |u| over the half-width."""
    body = anatomy.body
    phase: Field = 1 + (anatomy.v - np.float32(body.top) - np.float32(body.rib_slope) * x * x) * np.float32(1 / body.rib_spacing)
    return phase


def _band(phase: Field, half_width: float, sharp: float) -> Field:
    """Bands around every half phase, brighter at both rims."""
    off = np.abs(phase - np.floor(phase) - np.float32(0.5))
    cover = np.clip((half_width - off) * np.float32(sharp) + np.float32(0.5), 0, 1)
    band: Field = cover * (0.7 + np.clip(off - 0.4 * half_width, 0, None) * np.float32(2.2))
    return band
