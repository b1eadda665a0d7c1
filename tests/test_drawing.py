"""The atlas' drawing and its registration: what a textbook says of a frontal film holds in it."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from ssacl import drawing
from ssacl.anatomy import CHILDREN, INNER_NODES, LEAVES, NODE_INDEX, NODES, leaves_below, mirrored
from ssacl.atlas import CHART
from ssacl.losses.registration import SCALES, fit_pose, lay_drawing, principal_scales

DRAWN = drawing.drawn_nodes()
AREA = DRAWN.sum((1, 2))


def _overlap(first: str, second: str) -> float:
    """Area that both cover, as a share of the smaller one's."""
    one, other = DRAWN[NODE_INDEX[first]], DRAWN[NODE_INDEX[second]]
    return float(np.minimum(one, other).sum() / min(one.sum(), other.sum()))


def test_every_node_is_drawn_on_a_usual_film():
    assert DRAWN.shape == (len(NODES), drawing.RASTER_PX, drawing.RASTER_PX)
    assert (DRAWN >= 0).all()
    assert DRAWN.max() == 1
    assert (AREA > 5).all(), "in raster pixels"
    assert np.abs(np.array(CHART)).max() < 1


@pytest.mark.parametrize("node", [node for node in INNER_NODES if node != "cardiac silhouette"])
def test_inner_nodes_are_what_their_children_cover(node):
    union = DRAWN[[NODE_INDEX[child] for child in CHILDREN[node]]].max(0)
    assert (DRAWN[NODE_INDEX[node]] >= union - 1e-6).all()
    assert (
        DRAWN[NODE_INDEX[node]].sum() <= sum(AREA[NODE_INDEX[leaf]] for leaf in leaves_below(node)) + AREA[NODE_INDEX["cardiac silhouette"]]
    )


def test_right_and_left_are_mirrored_but_for_heart_and_diaphragm():
    for leaf in LEAVES:
        x, y = CHART[LEAVES.index(leaf)]
        twin_x, twin_y = CHART[LEAVES.index(mirrored(leaf))]
        if leaf.startswith("right ") and mirrored(leaf) != leaf:
            assert x < 0 < twin_x
            assert abs(x + twin_x) < 0.1
            assert abs(y - twin_y) < 0.08


def test_zones_divide_the_lung_and_the_heart_lies_between_the_lungs():
    for side in ("right", "left"):
        zones = [f"{side} {zone}" for zone in ("apical zone", "upper lung zone", "mid lung zone", "lower lung zone")]
        assert all(_overlap(a, b) < 0.1 for a in zones for b in zones if a < b)
        assert _overlap(f"{side} lung", "cardiac silhouette") < 0.15
    assert _overlap("right atrium", "cardiac silhouette") > 0.9
    assert _overlap("carina", "trachea") > 0.2
    heart = DRAWN[NODE_INDEX["cardiac silhouette"]].sum(0)
    middle = drawing.RASTER_PX // 2
    assert 0.55 < heart[middle:].sum() / heart.sum() < 0.8, "two thirds lie left of the midline, which is right on the image"


def test_the_drawing_reads_no_images_and_no_phantom():
    tree = ast.parse(Path(drawing.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module for module in modules if module and module.startswith("ssacl")} == {"ssacl.anatomy"}


def test_laid_drawing_lies_where_the_pose_says():
    turn = torch.tensor([[0.97, -0.24], [0.24, 0.97]])
    places = 0.75 * torch.tensor(CHART) @ turn.T + torch.tensor([0.1, -0.05])
    pose = fit_pose(places[None])
    assert [round(float(scale), 2) for scale in principal_scales(pose)] == [0.75, 0.75]
    laid = lay_drawing(pose, 48)[0].view(len(NODES), 48, 48)
    ticks = (torch.arange(48) * 2 + 1) / 48 - 1
    for index, leaf in enumerate(LEAVES):
        mass = laid[NODE_INDEX[leaf]]
        centroid = torch.stack([mass.sum(0) @ ticks, mass.sum(1) @ ticks]) / mass.sum()
        if (places[index].abs() < 0.8).all() and leaf != "spine":
            assert torch.allclose(centroid, places[index], atol=0.02), leaf


def test_a_collapsed_pose_still_gives_a_drawing():
    laid = lay_drawing(torch.zeros(1, 2, 3), 24)
    assert laid.isfinite().all()
    assert (laid.sum(-1) > 0).all()
    # As large as the smallest plausible patient.
    full = lay_drawing(torch.tensor([[[SCALES[0], 0, 0], [0, SCALES[0], 0]]]), 24)
    assert torch.allclose(laid.sum(), full.sum(), rtol=0.1)
