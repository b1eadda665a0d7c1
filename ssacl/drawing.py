"""The atlas' drawing: outlines of the anatomy on a frontal chest film, as a textbook describes them.

Source: general knowledge of the normal adult frontal radiograph, in centimetres: carina at T4/5, vertebrae about 2.5 cm apart, apices at
T1 some 11 cm above the carina and 3 cm above the clavicles, right dome at the tenth rib, left dome lower by half an interspace,
costophrenic angles 4 cm below the domes, thorax about 27 cm wide inside, cavoatrial junction two vertebrae below the carina, heart half
as wide as the thorax with a third of it right of the midline. Drawn once from such words, never fitted to the phantom generator or to a
film.

Coordinates: centimetres from the carina, x right and y down on the image; the patient faces the viewer, so the patient's right side lies
at negative x. Sided outlines are drawn for one side and mirrored where right and left are alike.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ssacl.anatomy import CHILDREN, INNER_NODES, NODE_INDEX, NODES

Points = tuple[tuple[float, float], ...]

HALF_WIDTH_CM = 18.0
"""Half a usual film."""
CARINA_Y = -0.24
"""Where the carina lies on a usual film, half-widths."""
REACH = 1.4
"""The drawing covers [-REACH, REACH]^2 half-widths: a little more than the film."""
RASTER_PX = 112
_FINE = 4  # fine pixels per raster pixel and axis

# Right and left lung, clockwise from the apex, drawn at positive x. The left one leaves room for the heart and the aortic knob.
_LUNG: dict[str, Points] = {
    "right": (
        *((4.4, -10.6), (6.2, -11.2), (8.6, -9.8), (10.9, -6.4), (12.5, -1.0), (13.3, 5.0), (13.6, 11.0), (13.6, 17.6)),
        *((12.4, 16.2), (10.6, 14.6), (8.6, 13.5), (6.6, 13.2), (4.8, 13.6), (3.8, 14.2)),
        *((4.6, 11.0), (4.8, 8.0), (4.0, 4.6), (3.0, 1.5), (2.8, -2.0), (3.0, -6.0), (3.4, -9.0)),
    ),
    "left": (
        *((4.4, -10.6), (6.2, -11.2), (8.6, -9.8), (10.9, -6.4), (12.5, -1.0), (13.3, 5.0), (13.6, 11.0), (13.6, 18.2)),
        *((12.6, 17.0), (11.2, 15.7), (9.6, 14.9), (8.6, 14.7)),
        *((8.4, 12.5), (7.4, 9.4), (6.0, 6.4), (4.6, 3.6), (3.6, 0.6), (4.4, -2.6), (3.6, -4.8), (3.2, -7.0), (3.4, -9.0)),
    ),
}
_ZONES_CM = {"apical zone": (-12.0, -7.2), "upper lung zone": (-7.2, -1.6), "mid lung zone": (-1.6, 5.4), "lower lung zone": (5.4, 19.0)}
"""Heights: above the clavicle; down to the hilum's top; the hilum's height; down to the diaphragm."""


def _oval(x: float, y: float, half_x: float, half_y: float, tilt_degrees: float = 0.0) -> Points:
    cos, sin = math.cos(math.radians(tilt_degrees)), math.sin(math.radians(tilt_degrees))
    turns = [2 * math.pi * step / 32 for step in range(32)]
    local = [(half_x * math.cos(turn), half_y * math.sin(turn)) for turn in turns]
    return tuple((x + u * cos - v * sin, y + u * sin + v * cos) for u, v in local)


def _bar(*line: tuple[float, float, float]) -> Points:
    """The band along (x, y, half thickness): thickness counts vertically for lying bands, sideways for standing ones."""
    lying = abs(line[-1][0] - line[0][0]) > abs(line[-1][1] - line[0][1])
    there = [(x, y - half) if lying else (x - half, y) for x, y, half in line]
    back = [(x, y + half) if lying else (x + half, y) for x, y, half in reversed(line)]
    return (*there, *back)


_SIDED: dict[str, Points] = {
    "hilar structures": _oval(4.0, 2.2, 1.9, 3.0),
    "costophrenic angle": ((11.4, 15.0), (13.6, 14.4), (13.8, 18.2), (12.6, 17.6), (11.0, 16.2)),
    "hemidiaphragm": _bar((3.2, 14.6, 1.1), (4.8, 13.6, 1.1), (6.6, 13.2, 1.1), (8.6, 13.5, 1.1), (10.6, 14.6, 1.1), (12.6, 16.6, 1.2)),
    "clavicle": _bar((1.6, -5.2, 0.9), (4.5, -6.6, 0.7), (8.0, -7.4, 0.7), (11.5, -8.6, 0.8), (14.5, -9.2, 0.9)),
}
_LEFT: dict[str, Points] = {
    "hilar structures": _oval(4.3, 1.2, 1.9, 3.0),
    "hemidiaphragm": _bar((4.0, 15.3, 1.1), (6.0, 14.6, 1.1), (8.6, 14.3, 1.1), (10.6, 15.0, 1.1), (12.6, 17.0, 1.2)),
    "costophrenic angle": ((11.4, 15.8), (13.6, 15.2), (13.8, 18.8), (12.6, 18.2), (11.0, 17.0)),
}
_MIDLINE: dict[str, Points] = {
    "trachea": _bar((0.0, -11.5, 1.0), (0.2, -6.0, 1.0), (0.2, -0.4, 1.1)),
    "upper mediastinum": ((-2.8, -9.0), (2.8, -9.0), (3.4, -5.0), (4.2, -2.8), (3.6, 0.0), (-2.8, 0.0), (-2.9, -5.0)),
    "aortic arch": _oval(2.5, -2.6, 2.1, 2.0),
    "superior vena cava": _bar((-2.1, -4.5, 1.0), (-2.2, 0.0, 1.0), (-2.6, 4.0, 1.0)),
    "cardiac silhouette": (
        *((-2.6, 3.4), (-4.2, 5.6), (-4.8, 8.4), (-4.4, 11.4), (-3.4, 13.4), (0.0, 14.4), (4.5, 14.6), (8.2, 13.8), (8.6, 12.0)),
        *((7.4, 9.2), (6.0, 6.2), (4.4, 3.4), (2.6, 1.8), (0.0, 2.2)),
    ),
    "right atrium": ((-2.4, 4.4), (-4.0, 5.8), (-4.8, 8.4), (-4.4, 11.4), (-3.2, 13.0), (-1.2, 12.6), (-0.8, 8.4), (-1.2, 5.4)),
    "cavoatrial junction": _oval(-2.6, 4.0, 1.3, 1.3),
    "carina": _oval(0.1, 0.3, 1.5, 1.3),
    "spine": _bar((0.0, -11.5, 1.7), (0.0, 4.0, 1.9), (0.0, 22.0, 2.1)),
    "abdomen": (
        *((-14.5, 25.0), (-14.5, 18.6), (-12.4, 16.6), (-10.6, 15.2), (-8.6, 14.1), (-6.6, 13.8), (-4.8, 14.2), (0.0, 15.0)),
        *((4.8, 15.6), (8.6, 15.2), (11.2, 16.2), (12.6, 17.4), (14.5, 19.4), (14.5, 25.0)),
    ),
}


def _mirrored(points: Points) -> Points:
    return tuple((-x, y) for x, y in points)


OUTLINES: dict[str, Points] = {
    **_MIDLINE,
    **{f"right {part}": _mirrored(points) for part, points in _SIDED.items()},
    **{f"left {part}": _LEFT.get(part, points) for part, points in _SIDED.items()},
}


@lru_cache(maxsize=1)
def drawn_nodes() -> NDArray[np.float32]:
    """[32, RASTER_PX, RASTER_PX] share of each raster pixel that a node covers, over [-REACH, REACH]^2.

    An inner node is the union of its children, but for the cardiac silhouette, of whose chambers only the right ones are leaves.
    """
    side = RASTER_PX * _FINE
    fine = np.zeros((len(NODES), side, side), dtype=bool)
    for name, points in OUTLINES.items():
        fine[NODE_INDEX[name]] = _filled(points)
    height_cm = _height_cm(side)
    for name, points in _LUNG.items():
        lung = _filled(_mirrored(points) if name == "right" else points)
        for zone, (top, bottom) in _ZONES_CM.items():
            fine[NODE_INDEX[f"{name} {zone}"]] = lung & (height_cm >= top) & (height_cm < bottom)
    for node in reversed(INNER_NODES):
        if node not in OUTLINES:
            fine[NODE_INDEX[node]] = fine[[NODE_INDEX[child] for child in CHILDREN[node]]].any(0)
    blocks = fine.reshape(len(NODES), RASTER_PX, _FINE, RASTER_PX, _FINE)
    shares: NDArray[np.float32] = blocks.mean(axis=(2, 4)).astype(np.float32)
    return shares


def _filled(points: Points) -> NDArray[np.bool_]:
    side = RASTER_PX * _FINE
    picture = Image.new("1", (side, side))
    ImageDraw.Draw(picture).polygon([tuple((_on_chart(point) + REACH) * side / (2 * REACH)) for point in points], fill=1)
    return np.asarray(picture)


def _on_chart(point: tuple[float, float]) -> NDArray[np.float64]:
    return np.array([point[0] / HALF_WIDTH_CM, CARINA_Y + point[1] / HALF_WIDTH_CM])


def _height_cm(side: int) -> NDArray[np.float64]:
    chart = ((np.arange(side) + 0.5) / side * 2 - 1) * REACH
    return ((chart - CARINA_Y) * HALF_WIDTH_CM)[:, None]


@lru_cache(maxsize=1)
def drawn_centroids() -> tuple[tuple[float, float], ...]:
    """(x, y) of the 32 nodes' centroids, half-widths of the film."""
    drawn = drawn_nodes().astype(np.float64)
    ticks = ((np.arange(RASTER_PX) + 0.5) / RASTER_PX * 2 - 1) * REACH
    mass = drawn.sum((1, 2))
    return tuple(zip((drawn.sum(1) @ ticks / mass).tolist(), (drawn.sum(2) @ ticks / mass).tolist(), strict=True))
