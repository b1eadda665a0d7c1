"""The 32 anatomy nodes of a posed phantom as masks."""

from __future__ import annotations

import numpy as np

from ssacl.anatomy import CHILDREN, INNER_NODES, NODE_INDEX, NODES
from ssacl.phantom.geometry import LEFT, RIGHT, ZONE_ENDS, Anatomy, Mask

SIDE_NAMES = {RIGHT: "right", LEFT: "left"}


def node_masks(anatomy: Anatomy) -> Mask:
    """Masks of all nodes, [32, S, S] bool in `NODES` order.

    An inner node is the union of its children; the cardiac silhouette, of whose chambers only the right ones are leaves, is
    the whole heart. A mask is empty where the film cuts the anatomy off.
    """
    masks = np.zeros((len(NODES), *anatomy.u.shape), dtype=bool)
    for name, mask in _leaves(anatomy).items():
        masks[NODE_INDEX[name]] = mask
    masks[NODE_INDEX["cardiac silhouette"]] = anatomy.heart > 0
    for node in reversed(INNER_NODES):
        for child in CHILDREN[node]:
            masks[NODE_INDEX[node]] |= masks[NODE_INDEX[child]]
    return masks


def _leaves(anatomy: Anatomy) -> dict[str, Mask]:
    body, u, v = anatomy.body, anatomy.u, anatomy.v
    result: dict[str, Mask] = {}
    heart = anatomy.heart > 0
    cage = anatomy.cage > 0
    for side, name in SIDE_NAMES.items():
        field, share = anatomy.lungs[side], anatomy.lung_share(side)
        lung = (field > 0) & ~heart
        for zone, (start, end) in ZONE_ENDS.items():
            result[f"{name} {zone}"] = lung & (share >= start) & (share < end)
        surface = anatomy.diaphragm_here[side]
        outward = u if side == LEFT else -u
        result[f"{name} hemidiaphragm"] = (np.abs(v - surface) < 0.05) & cage & (outward > 0.16)
        angle_u, angle_v = anatomy.angle_point(side)
        near = anatomy.ellipse((angle_u, angle_v - 0.06), (0.16, 0.17)) > 0
        result[f"{name} costophrenic angle"] = near & cage & (v < surface + 0.03)
        result[f"{name} hilar structures"] = anatomy.ellipse(anatomy.hila[side], (0.12, 0.17)) > 0
        result[f"{name} clavicle"] = anatomy.clavicle(side)[0] > 0
    carina_u, carina_v = anatomy.carina
    result["trachea"] = (np.abs(u - anatomy.trachea_u(v)) < 0.065) & (v < carina_v) & (v > body.top - 0.2)
    result["carina"] = anatomy.ellipse((carina_u, carina_v), (0.085, 0.075)) > 0
    middle = (u < anatomy.medial(v, LEFT)) & (-u < anatomy.medial(v, RIGHT)) & cage
    result["upper mediastinum"] = middle & (v > body.top + 0.08) & (v < carina_v)
    knob_u, knob_v = anatomy.knob_centre
    result["aortic arch"] = anatomy.ellipse((knob_u - 0.02, knob_v), (0.145, 0.12)) > 0
    junction_u, junction_v = anatomy.junction
    result["superior vena cava"] = (
        (np.abs(u - np.float32(junction_u + 0.03)) < 0.06) & (v < junction_v) & (v > junction_v - 0.42 * body.height)
    )
    result["cavoatrial junction"] = anatomy.ellipse(anatomy.junction, (0.075, 0.075)) > 0
    result["right atrium"] = (anatomy.atrium > 0) & (u < anatomy.atrium_centre[0] + 0.1)
    result["spine"] = np.abs(u - anatomy.spine_u(v)) < 0.105
    below = np.where(u > 0, anatomy.diaphragm_here[LEFT], anatomy.diaphragm_here[RIGHT])
    result["abdomen"] = (v > below + 0.03) & (np.abs(u) < body.half_width + body.fat)
    return result
