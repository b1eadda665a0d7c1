"""Grounding scores against cases worked out by hand, a slow reference, and maps whose worth is known."""

import json
import time

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from ssacl.anatomy import LEAVES, NODES
from ssacl.errors import DataError
from ssacl.evaluation.grounding import (
    GroundingScores,
    Threshold,
    average_mask_maps,
    centre_maps,
    choose_threshold,
    grounding_scores,
    node_group,
    random_maps,
    scores_with_baselines,
    summary_rows,
)

LUNGS = ("right lung", "left lung")
HALF = {node: Threshold("relative", 0.5) for node in NODES}


def _box(y0: int, y1: int, x0: int, x1: int, side: int = 224) -> NDArray[np.bool_]:
    mask = np.zeros((side, side), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def _dot(row: int, column: int, grid: int = 14) -> NDArray[np.float32]:
    one = np.zeros((grid, grid), dtype=np.float32)
    one[row, column] = 1
    return one


def _one(a_map: NDArray[np.float32], mask: NDArray[np.bool_], threshold: Threshold = HALF["spine"], **options: float) -> GroundingScores:
    return grounding_scores(a_map[None, None], mask[None, None], {"spine": threshold}, nodes=["spine"], **options)


def _moving_boxes(num_cases: int, seed: int, side: int = 112) -> NDArray[np.bool_]:
    """[n, 2, S, S] two squares, each somewhere in its half of the picture."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((num_cases, 2, side, side), dtype=bool)
    for case in range(num_cases):
        for node, low in enumerate((0, side // 2)):
            y, x = rng.integers(0, side - 24), low + rng.integers(0, side // 2 - 24)
            masks[case, node, y : y + 24, x : x + 24] = True
    return masks


def _pooled(masks: NDArray[np.bool_], grid: int = 14) -> NDArray[np.float32]:
    cell = masks.shape[-1] // grid
    return masks.reshape(*masks.shape[:2], grid, cell, grid, cell).mean(axis=(3, 5)).astype(np.float32)


def test_maximum_within_16_px_hits_and_beyond_misses() -> None:
    # The lone cell (5, 5) of 14 is smoothed around the pixel (88, 88) of 224.
    for gap, hit in ((0, 1.0), (14, 1.0), (18, 0.0)):
        mask = _box(60, 120, 88 + gap, 200)
        assert _one(_dot(5, 5), mask).nodes["spine"].pointing == hit, gap
        mask = _box(60, 120, 0, 88 - gap)
        assert _one(_dot(5, 5), mask).nodes["spine"].pointing == hit, gap


def test_hit_radius_scales_with_the_mask() -> None:
    assert _one(_dot(5, 5), _box(30, 60, 51, 100, side=112)).nodes["spine"].pointing == 1.0
    assert _one(_dot(5, 5), _box(30, 60, 54, 100, side=112)).nodes["spine"].pointing == 0.0


def test_pointing_uses_the_smoothed_map() -> None:
    # One loud cell against a broad hill: raw argmax is noise, the smoothed maximum is the hill.
    hill = gaussian_filter(_dot(10, 10), 1.5) * 6
    noisy = hill + _dot(2, 2) * (hill.max() * 1.2)
    assert noisy.argmax() == 2 * 14 + 2
    mask = _box(150, 200, 150, 200)
    assert _one(noisy, mask).nodes["spine"].pointing == 1.0
    assert _one(noisy, mask, sigma_cells=0.0).nodes["spine"].pointing == 0.0


def test_iou_by_hand() -> None:
    # No smoothing and no resizing: 4 x 4 map and mask. Kept at >= half the maximum: 3 pixels, 2 of them among the mask's 4.
    a_map = np.zeros((4, 4), dtype=np.float32)
    a_map[0] = (1.0, 0.6, 0.55, 0.4)
    mask = _box(0, 2, 0, 2, side=4)
    assert _one(a_map, mask, sigma_cells=0.0).nodes["spine"].iou == pytest.approx(2 / 5)
    # The brightest quarter of 16 pixels: the whole first row.
    assert _one(a_map, mask, Threshold("area", 0.25), sigma_cells=0.0).nodes["spine"].iou == pytest.approx(2 / 6)
    assert _one(a_map, mask, Threshold("area", 0.05), sigma_cells=0.0).nodes["spine"].iou == pytest.approx(1 / 4)


def test_landmark_and_correlation_by_hand() -> None:
    masks = np.stack([_box(112, 128, x, x + 16) for x in (16, 64, 112, 160)])[:, None]
    # Maps stand two cells (2 / 7 half-widths) right of the truth, and always in the same row.
    maps = np.stack([_dot(7, x // 16 + 2) for x in (16, 64, 112, 160)])[:, None]
    scores = grounding_scores(maps, masks, HALF, nodes=["spine"]).nodes["spine"]
    assert scores.landmark == pytest.approx(2 / 7)
    assert scores.correlation_x == pytest.approx(1.0)
    assert scores.correlation_y is None
    mirrored = grounding_scores(maps[::-1], masks, HALF, nodes=["spine"]).nodes["spine"]
    assert mirrored.correlation_x == pytest.approx(-1.0)


def test_a_map_that_never_moves_counts_as_no_correlation() -> None:
    masks = _moving_boxes(8, seed=0)
    scores = grounding_scores(centre_maps(8, 14, 2), masks, HALF, nodes=LUNGS)
    assert scores.nodes["right lung"].correlation_x is None
    assert scores.mean("correlation_x", LUNGS) == 0.0


def test_missing_anatomy_leaves_its_case_out() -> None:
    masks = np.stack([_box(80, 96, 80, 96), np.zeros((224, 224), dtype=bool)])[:, None].repeat(2, axis=1)
    masks[:, 1] = False
    maps = np.stack([_dot(5, 5)] * 2)[:, None].repeat(2, axis=1)
    scores = grounding_scores(maps, masks, HALF, nodes=LUNGS)
    assert scores.nodes["right lung"].num_cases == 1
    assert scores.nodes["right lung"].pointing == 1.0
    assert scores.nodes["left lung"].pointing is None
    assert scores.mean("pointing", LUNGS) == 1.0
    assert scores.mean("pointing", ["left lung"]) is None


def test_flat_map_points_at_the_middle_not_a_corner() -> None:
    flat = np.ones((14, 14), dtype=np.float32)
    assert _one(flat, _box(100, 124, 100, 124), sigma_cells=0.0).nodes["spine"].pointing == 1.0
    assert _one(flat, _box(0, 20, 0, 20), sigma_cells=0.0).nodes["spine"].pointing == 0.0


def test_threshold_is_the_best_of_the_grid_on_validation() -> None:
    masks = _moving_boxes(12, seed=1)
    maps = _pooled(masks) + 0.05 * random_maps(12, 14, seed=5, num_nodes=2)
    chosen = choose_threshold(maps, masks, nodes=LUNGS)
    assert chosen["right lung"] == chosen["left lung"]
    best = grounding_scores(maps, masks, chosen, nodes=LUNGS).mean("iou", LUNGS)
    assert best is not None
    for value in (0.1, 0.3, 0.5, 0.7, 0.9):
        for kind in ("relative", "area"):
            other = {node: Threshold(kind, value) for node in LUNGS}
            assert best >= (grounding_scores(maps, masks, other, nodes=LUNGS).mean("iou", LUNGS) or 0) - 0.01
    assert best > 0.4


def test_groups_join_twins_only() -> None:
    assert node_group("right apical zone") == node_group("left apical zone")
    assert node_group("right lung") == node_group("left lung") != node_group("lungs")
    assert node_group("right atrium") not in {node_group(node) for node in NODES if node != "right atrium"}


def test_true_maps_beat_every_baseline_and_random_is_worst() -> None:
    masks, validation = _moving_boxes(30, seed=2), _moving_boxes(30, seed=3)
    noise = random_maps(30, 14, seed=9, num_nodes=2) * 0.05
    scores = scores_with_baselines(_pooled(masks) + noise, masks, _pooled(validation) + noise, validation, nodes=LUNGS)
    assert set(scores) == {"model", "average_mask", "centre", "random"}
    iou = {name: each.mean("iou", LUNGS) or 0.0 for name, each in scores.items()}
    assert iou["model"] > 0.5 > iou["average_mask"] > iou["random"]
    assert scores["model"].mean("pointing", LUNGS) == 1.0
    assert (scores["model"].mean("correlation_x", LUNGS) or 0) > 0.95
    assert (scores["average_mask"].mean("pointing", LUNGS) or 0) < 0.7
    rows = summary_rows(scores)
    assert [row["maps"] for row in rows] == ["model", "average_mask", "centre", "random"]
    assert rows[0]["right_lung_pointing"] == 1.0
    assert rows[0]["leaves_pointing"] is None, "no leaf was scored"
    assert scores["average_mask"].mean("correlation_x", LUNGS) == 0.0


def test_average_mask_baseline_is_the_mean_of_the_other_cases() -> None:
    masks = np.stack([_box(0, 4, 0, 8, side=8), _box(0, 8, 0, 4, side=8)])[:, None]
    average = average_mask_maps(masks, 5)
    assert average.shape == (5, 1, 8, 8)
    assert average[3, 0, 0, 0] == 1.0
    assert average[3, 0, 0, 7] == average[3, 0, 7, 0] == 0.5
    assert average[3, 0, 7, 7] == 0.0


def test_json_tree_has_every_node_and_plain_numbers() -> None:
    masks = np.tile(_box(40, 60, 40, 60, side=112), (3, 32, 1, 1))
    scores = grounding_scores(random_maps(3, 14), masks, HALF)
    tree = json.loads(json.dumps(scores.to_json(), allow_nan=False))
    assert list(tree["nodes"]) == list(NODES)
    assert tree["nodes"]["right lung"]["threshold"] == {"kind": "relative", "value": 0.5}
    leaves = np.mean([tree["nodes"][leaf]["iou"] for leaf in LEAVES])
    assert tree["means"]["leaves"]["iou"] == pytest.approx(leaves, abs=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_maps_that_are_no_attention_are_refused(bad: float) -> None:
    maps = np.ones((2, 1, 14, 14), dtype=np.float32)
    maps[1, 0, 3, 3] = bad
    masks = np.tile(_box(0, 20, 0, 20), (2, 1, 1, 1))
    with pytest.raises(DataError, match="not finite or negative"):
        grounding_scores(maps, masks, HALF, nodes=["spine"])


def test_maps_without_mass_point_nowhere_and_still_score() -> None:
    masks = np.tile(_box(0, 20, 0, 20), (2, 1, 1, 1))
    scores = grounding_scores(np.zeros((2, 1, 14, 14), dtype=np.float32), masks, HALF, nodes=["spine"])
    json.dumps(scores.to_json(), allow_nan=False)
    assert scores.nodes["spine"].pointing == 0.0


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (np.ones((2, 31, 14, 14)), np.ones((2, 31, 28, 28), dtype=bool), "expected \\[cases, 32 nodes"),
        (np.ones((2, 32, 14, 14)), np.ones((3, 32, 28, 28), dtype=bool), "expected bool \\[2, 32"),
        (np.ones((2, 32, 14, 14)), np.ones((2, 32, 28, 28)), "expected bool"),
        (np.ones((0, 32, 14, 14)), np.ones((0, 32, 28, 28), dtype=bool), "no case"),
    ],
)
def test_shapes_that_do_not_fit_are_named(maps: NDArray[np.float64], masks: NDArray[np.bool_], message: str) -> None:
    with pytest.raises(DataError, match=message):
        grounding_scores(maps, masks, HALF)
    with pytest.raises(DataError, match=message):
        choose_threshold(maps, masks)


def test_a_node_without_threshold_is_named() -> None:
    masks = np.tile(_box(0, 20, 0, 20), (2, 1, 1, 1))
    with pytest.raises(DataError, match="'spine'"):
        grounding_scores(np.ones((2, 1, 14, 14), dtype=np.float32), masks, {}, nodes=["spine"])


def test_150_cases_take_seconds() -> None:
    masks = np.tile(_box(40, 90, 40, 90), (150, 32, 1, 1))
    maps = random_maps(150, 14)
    started = time.process_time()
    grounding_scores(maps, masks, HALF)
    assert time.process_time() - started < 10
