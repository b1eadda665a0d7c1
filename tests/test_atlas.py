"""The atlas: its own relations hold on its own chart, both sides are treated alike, and it takes nothing from images."""

import ast
from pathlib import Path

import numpy as np
import pytest

from ssacl import atlas
from ssacl.anatomy import LEAF_INDEX, LEAVES, mirrored
from ssacl.atlas import CHART, OVERLAPS, RELATIONS


def _position(leaf: str) -> tuple[float, float]:
    return CHART[LEAF_INDEX[leaf]]


def test_chart_has_a_position_inside_the_film_for_every_leaf() -> None:
    assert len(CHART) == len(LEAVES) == 25
    assert np.abs(np.array(CHART)).max() < 1
    assert len(set(CHART)) == 25


def test_patients_right_is_image_left() -> None:
    for leaf in LEAVES:
        if leaf.startswith("right "):
            assert _position(leaf)[0] < 0, leaf
        elif leaf.startswith("left "):
            assert _position(leaf)[0] > 0, leaf


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda r: f"{r.first} {r.kind} {r.second}")
def test_relations_hold_on_the_chart_of_a_small_thorax(relation: atlas.Relation) -> None:
    # With the hinge's margin of 0.05, at 0.85 of the chart: a relation that the drawing itself breaks would fight the chart term.
    (x1, y1), (x2, y2) = (np.array(_position(name)) * 0.85 for name in (relation.first, relation.second))
    if relation.kind == "left_of":
        assert x1 + 0.05 <= x2
    elif relation.kind == "above":
        assert y1 + 0.05 <= y2
    elif relation.kind == "medial_of":
        assert abs(x1) + 0.05 <= abs(x2)
        assert relation.second.startswith(("right ", "left ")), "the side of the second names the direction"
    else:
        assert abs(y1 - y2) <= 0.05
    assert relation.reason


def test_no_relation_stands_twice() -> None:
    pairs = [frozenset((relation.first, relation.second, relation.kind)) for relation in RELATIONS]
    assert len(set(pairs)) == len(pairs)


def test_relations_of_sided_leaves_are_mirrored() -> None:
    known = {(r.kind, r.first, r.second) for r in RELATIONS}
    for kind, first, second in known:
        if kind in ("above", "medial_of") and mirrored(first) != first and mirrored(second) != second:
            assert (kind, mirrored(first), mirrored(second)) in known


def test_overlaps_name_two_leaves_with_a_reason_and_never_two_sides() -> None:
    for pair, reason in OVERLAPS.items():
        assert len(pair) == 2
        assert pair <= set(LEAVES)
        assert reason
        assert frozenset(map(mirrored, pair)) in OVERLAPS
        sides = {name.split()[0] for name in pair if mirrored(name) != name}
        assert len(sides) <= 1, pair
    assert frozenset(("carina", "trachea")) in OVERLAPS
    assert frozenset(("right hilar structures", "right mid lung zone")) in OVERLAPS


def test_atlas_reads_no_images() -> None:
    tree = ast.parse(Path(atlas.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert modules == {"__future__", "collections.abc", "dataclasses", "typing", "ssacl.anatomy", "ssacl.drawing"}
