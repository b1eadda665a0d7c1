"""Findings as changes of the picture: each painter changes a `Scene` and returns the mask of what it changed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ssacl.phantom.findings import TrueFinding, lesion_radius
from ssacl.phantom.geometry import LEFT, RIGHT, Field, Mask, soft
from ssacl.phantom.render import Scene, draw_lines, rib_phase

Painter = Callable[[Scene, TrueFinding], Mask]
SIDES = {"right": (RIGHT,), "left": (LEFT,), "bilateral": (RIGHT, LEFT), "": ()}


def paint(scene: Scene, finding: TrueFinding) -> Mask:
    """Put `finding` into `scene`. Returns the mask of the changed pixels, [S, S] bool."""
    return _PAINTERS[finding.name](scene, finding)


def _cardiomegaly(scene: Scene, finding: TrueFinding) -> Mask:
    return scene.anatomy.heart > 0


def _mediastinum(scene: Scene, finding: TrueFinding) -> Mask:
    anatomy = scene.anatomy
    v = anatomy.v
    inside = (anatomy.u < anatomy.medial(v, LEFT)) & (-anatomy.u < anatomy.medial(v, RIGHT)) & (anatomy.cage > 0)
    mask: Mask = inside & (v > anatomy.body.top + 0.1) & (v < 0.0)
    scene.extra += 0.15 * soft(np.where(mask, np.float32(0.1), np.float32(-0.1)), 0.1)
    return mask


def _blob(scene: Scene, finding: TrueFinding, radius: float, ragged: float) -> tuple[Field, Field]:
    """Signed distance to a ragged blob's edge inside the finding's zone, and the lung's coverage there."""
    anatomy = scene.anatomy
    side = SIDES[finding.side][0]
    zone = finding.zones[0].split(" ", 1)[1]
    across, along, stretch = finding.place[:3]
    centre = anatomy.zone_point(side, zone, 0.35 + 0.35 * across, 0.3 + 0.4 * along)
    radii = (radius * (0.85 + 0.4 * stretch), radius * (1.15 - 0.3 * stretch))
    distance = anatomy.ellipse(centre, radii)
    if ragged:
        distance = distance + np.float32(ragged) * scene.noise(22)
    return distance.astype(np.float32), soft(anatomy.lungs[side], 2 * anatomy.frame.px)


def _opacity(scene: Scene, finding: TrueFinding) -> Mask:
    distance, lung = _blob(scene, finding, 0.31 + 0.1 * finding.place[3], 0.02)
    haze = soft(distance - 0.06, 0.22) * lung
    scene.extra += (0.3 + 0.2 * finding.amount) * haze
    return haze > 0.25


def _lesion(scene: Scene, finding: TrueFinding) -> Mask:
    distance, lung = _blob(scene, finding, lesion_radius(finding.amount), 0.0)
    disc = soft(distance, 1.5 * scene.anatomy.frame.px) * lung
    scene.extra += (0.55 + 0.2 * finding.amount) * disc
    return disc > 0.5


def _consolidation(scene: Scene, finding: TrueFinding) -> Mask:
    distance, lung = _blob(scene, finding, 0.24 + 0.12 * finding.amount, 0.025)
    dense = soft(distance, 0.06) * lung
    scene.extra += (0.45 + 0.3 * finding.amount) * dense
    scene.vessels *= 1 - 0.8 * dense
    return dense > 0.4


def _pneumonia(scene: Scene, finding: TrueFinding) -> Mask:
    anatomy = scene.anatomy
    distance, lung = _blob(scene, finding, 0.28 + 0.1 * finding.amount, 0.02)
    area = soft(distance, 0.1) * lung
    patches = np.clip(scene.noise(26) * 0.7 + 0.6, 0, 1.3)
    # Air bronchograms: dark tubes that run from the hilum into the patch.
    hilum = anatomy.hila[SIDES[finding.side][0]]
    zone = finding.zones[0].split(" ", 1)[1]
    tubes = [
        ([hilum, anatomy.zone_point(SIDES[finding.side][0], zone, 0.25 + 0.18 * branch, 0.2 + 0.3 * branch)], 0.022, 0.5)
        for branch in range(3)
    ]
    scene.extra += area * ((0.22 + 0.4 * finding.amount) * patches - 0.3 * draw_lines(anatomy, tubes))
    return area > 0.4


def _edema(scene: Scene, finding: TrueFinding) -> Mask:
    anatomy = scene.anatomy
    haze = np.zeros_like(scene.extra)
    for side in (RIGHT, LEFT):
        hilum = anatomy.hila[side]
        wing = anatomy.ellipse((hilum[0] + side * 0.14, hilum[1] + 0.1), (0.42, 0.55))
        haze = np.maximum(haze, soft(wing - 0.16, 0.34) * soft(anatomy.lungs[side], 2 * anatomy.frame.px))
    # Septal lines: a fine net, strongest where the haze is.
    net = np.abs(scene.noise(56))
    scene.extra += haze * (0.14 + 0.26 * finding.amount) + haze * (0.2 + 0.26 * finding.amount) * np.clip(0.55 - net, 0, 1)
    scene.vessels *= 1 + 0.7 * finding.amount
    return haze > 0.3


def _atelectasis(scene: Scene, finding: TrueFinding) -> Mask:
    anatomy = scene.anatomy
    lines = []
    for side in SIDES[finding.side]:
        for band in range(2 + (finding.amount > 0.4)):
            along = 0.1 + 0.3 * band + 0.15 * finding.place[band]
            start = anatomy.zone_point(side, "lower lung zone", 0.05, along)
            end = anatomy.zone_point(side, "lower lung zone", 0.55 + 0.35 * finding.place[3], along)
            tilt = 0.14 * (finding.place[4] - 0.5)
            middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.02)
            width = 0.024 + 0.02 * finding.amount
            lines.append(([start, middle, (end[0], end[1] + tilt)], width, 0.3 + 0.3 * finding.amount))
    cover = draw_lines(anatomy, lines)
    cover *= soft(np.maximum(anatomy.lungs[RIGHT], anatomy.lungs[LEFT]), 2 * anatomy.frame.px)
    scene.extra += cover
    return cover > 0.1


def _pneumothorax(scene: Scene, finding: TrueFinding) -> Mask:
    anatomy = scene.anatomy
    side = SIDES[finding.side][0]
    lung = anatomy.lungs[side]
    outward = anatomy.u if side == LEFT else -anatomy.u
    body = anatomy.body
    # The lung falls away from the wall, most at the apex.
    height = np.clip((anatomy.v - body.top) / np.float32(body.dome(side) - body.top), 0, 1)
    gap = (0.07 + 0.36 * finding.amount) * (1 - 0.55 * height) * (1 if finding.amount > 0.4 else np.clip(1.25 - 2 * height, 0, 1))
    from_top = anatomy.v - np.float32(body.top)
    wall = np.minimum(anatomy.lateral_here - outward, from_top * 0.9)
    line = (wall - gap).astype(np.float32)
    inside = soft(lung, 2 * anatomy.frame.px)
    free = soft(-line, 1.5 * anatomy.frame.px) * inside * (gap > 0.01)
    scene.vessels *= 1 - free
    scene.extra -= 0.16 * free
    scene.extra += 0.45 * soft(0.013 - np.abs(line), 1.5 * anatomy.frame.px) * inside * (gap > 0.01)
    mask: Mask = free > 0.5
    return mask


def _effusion(scene: Scene, finding: TrueFinding) -> Mask:
    anatomy = scene.anatomy
    body = anatomy.body
    mask = np.zeros(anatomy.u.shape, dtype=bool)
    heart = soft(anatomy.heart, 3 * anatomy.frame.px)
    for side in SIDES[finding.side]:
        outward = anatomy.u if side == LEFT else -anatomy.u
        level = anatomy.angle_point(side)[1] - 0.14 - 0.52 * finding.amount
        x = np.clip(outward / np.float32(body.half_width), 0, 1)
        # Meniscus: the fluid climbs the lateral wall.
        surface = level + 0.16 - 0.3 * x * x * x
        fluid = soft((anatomy.v - surface).astype(np.float32), 0.05) * soft(anatomy.lungs[side], 2 * anatomy.frame.px)
        scene.extra += 0.62 * fluid * (1 - heart)
        scene.vessels *= 1 - 0.9 * fluid
        mask |= fluid > 0.4
    return mask


def _pleural_other(scene: Scene, finding: TrueFinding) -> Mask:
    anatomy = scene.anatomy
    side = SIDES[finding.side][0]
    lung, share = anatomy.lungs[side], anatomy.lung_share(side)
    outward = anatomy.u if side == LEFT else -anatomy.u
    thick = 0.09 + 0.09 * finding.amount + np.float32(0.008) * scene.noise(24)
    inside = soft(lung, 2 * anatomy.frame.px)
    if finding.kind == "plaque":
        # A dense, knobbly cap along the dome.
        surface = anatomy.diaphragm_here[side]
        x = outward / np.float32(anatomy.body.half_width)
        cover = soft(0.6 * thick - np.abs(anatomy.v - surface), 1.5 * anatomy.frame.px) * (x > 0.35) * (x < 0.75)
        scene.extra += (0.3 + 0.25 * finding.amount) * cover
        return np.asarray(cover > 0.5)
    wall = anatomy.lateral_here - outward
    if finding.kind == "apical thickening":
        cover = soft(1.3 * thick - np.minimum(wall, anatomy.v - np.float32(anatomy.body.top)), 2 * anatomy.frame.px) * (share < 0.22)
    else:
        cover = soft(thick - wall, 2 * anatomy.frame.px) * soft(0.22 - np.abs(share - 0.6).astype(np.float32), 0.08)
    cover = cover * inside
    scene.extra += (0.5 + 0.3 * finding.amount) * cover
    return np.asarray(cover > 0.4)


def _fracture(scene: Scene, finding: TrueFinding) -> Mask:
    anatomy = scene.anatomy
    side = SIDES[finding.side][0]
    if finding.kind == "clavicle":
        share = 0.4 + 0.2 * finding.place[0]
        drop = 0.1 + 0.08 * finding.amount
        scene.clavicle_steps[side] = (share, drop)
        at = (side * (0.11 + 0.86 * share) + anatomy.pose.turn, float(anatomy.clavicle_v(share)) + drop / 2)
        return anatomy.ellipse(at, (0.12, 0.11)) > 0
    outward = anatomy.u if side == LEFT else -anatomy.u
    x = np.clip(outward, 0, None) * np.float32(1 / anatomy.body.half_width)
    phase = rib_phase(anatomy, x)
    at_x = 0.62 + 0.14 * finding.place[0]
    on_rib = np.abs(phase - (finding.number + 0.5)) < 1.5
    beyond = (outward > 0) & (x > at_x) & (x < at_x + 0.3) & on_rib
    shift = np.where(beyond, np.float32(-0.35 - 0.12 * finding.amount), np.float32(0))
    scene.rib_shift = shift if scene.rib_shift is None else scene.rib_shift + shift
    # A dark fracture line through each rib, and the white rim of the overlapping ends.
    near = (outward > 0) & on_rib
    bone = np.abs(phase - np.floor(phase) - np.float32(0.5)) < 0.27
    gap = near * soft(0.026 - np.abs(x - at_x), 1.5 * anatomy.frame.px)
    scene.extra += near * bone * 0.6 * soft(0.04 - np.abs(x - at_x - 0.045), 1.5 * anatomy.frame.px) - 0.5 * bone * gap
    return np.asarray(near & (np.abs(x - at_x) < 0.1))


def _device(scene: Scene, finding: TrueFinding) -> Mask:
    anatomy = scene.anatomy
    body = anatomy.body
    wobble = [0.04 * (value - 0.5) for value in finding.place]
    side = SIDES[finding.side][0] if finding.side else RIGHT
    carina_u, carina_v = anatomy.carina
    junction = anatomy.junction
    above = body.top - 0.45
    if finding.kind == "endotracheal tube":
        tip = carina_v - 0.12 - 0.12 * finding.place[0]
        axis = [(float(anatomy.trachea_u(np.float32(v))), v) for v in (above, (above + tip) / 2, tip)]
        lines = [(axis, 0.06, 0.35), (axis, 0.02, 0.7)]
    elif finding.kind == "jugular line":
        path = [
            (-0.3 + wobble[0], above),
            (-0.24, body.top + 0.2),
            (junction[0] + 0.02 + wobble[1], -0.3),
            (junction[0] + wobble[2], junction[1]),
        ]
        lines = [(path, 0.028, 0.7)]
    elif finding.kind == "picc":
        path = [
            (side * (body.half_width + 0.35), body.top + 0.75),
            (side * 0.85, body.top + 0.32 + wobble[0]),
            (side * 0.35, body.top + 0.33 + wobble[1]),
            (junction[0] * 0.8, body.top + 0.45),
            (junction[0] + wobble[2], junction[1] - 0.1),
        ]
        lines = [(path, 0.026, 0.65)]
    elif finding.kind == "pacemaker":
        box = (side * (0.62 + wobble[0]), body.top + 0.48 + wobble[1])
        lead = [box, (side * 0.35, body.top + 0.3), (junction[0], body.top + 0.5), junction]
        apex = (anatomy.heart_centre[0] + 0.35 * anatomy.heart_radii[0], anatomy.heart_centre[1] + 0.15)
        lines = [([*lead, (junction[0] + 0.05, 0.3), apex], 0.022, 0.65), ([(box[0] - 0.09, box[1]), (box[0] + 0.09, box[1])], 0.17, 0.9)]
    elif finding.kind == "enteric tube":
        stomach = (0.4 + wobble[0], body.dome_left + 0.22)
        lines = [([(carina_u + 0.03, above), (0.04 + wobble[1], -0.4), (0.06, 0.35), (0.16, body.dome_left + 0.12), stomach], 0.032, 0.65)]
    else:
        entry = anatomy.zone_point(side, "lower lung zone", 1.15, 0.3)
        path = [
            entry,
            anatomy.zone_point(side, "lower lung zone", 0.7, 0.1),
            anatomy.zone_point(side, "upper lung zone", 0.75, 0.3 + wobble[0]),
        ]
        lines = [(path, 0.06, 0.4), (path, 0.02, 0.7)]
    drawn = draw_lines(anatomy, lines)
    scene.extra += 1.3 * drawn
    return drawn > 0.08


_PAINTERS: dict[str, Painter] = {
    "Enlarged Cardiomediastinum": _mediastinum,
    "Cardiomegaly": _cardiomegaly,
    "Lung Opacity": _opacity,
    "Lung Lesion": _lesion,
    "Edema": _edema,
    "Consolidation": _consolidation,
    "Pneumonia": _pneumonia,
    "Atelectasis": _atelectasis,
    "Pneumothorax": _pneumothorax,
    "Pleural Effusion": _effusion,
    "Pleural Other": _pleural_other,
    "Fracture": _fracture,
    "Support Devices": _device,
}
