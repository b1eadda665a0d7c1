"""Films and masks under a pose: image, mask and points move together."""

import numpy as np
import pytest

from ssacl.evaluation.conditions import CONDITIONS, Pose, pose_of


@pytest.mark.parametrize("condition", CONDITIONS)
def test_image_mask_and_points_move_together(condition: str) -> None:
    side = 96
    place = np.array([0.2, -0.1])
    ticks = (np.arange(side) * 2 + 1) / side - 1
    blob = np.exp(-((ticks[None, :] - place[0]) ** 2 + (ticks[:, None] - place[1]) ** 2) / 0.005).astype(np.float32)
    for number in range(8):
        pose = pose_of(condition, f"film {number}", 80, 100)
        assert pose.is_identity == (condition == "plain")
        expected = pose.moved(place)
        image, mask = pose.moved_image(blob), pose.moved_mask(blob > 0.3)
        for weights in (image.astype(np.float64), mask.astype(np.float64)):
            found = np.array([weights.sum(0) @ ticks, weights.sum(1) @ ticks]) / weights.sum()
            assert np.abs(found - expected).max() < 0.02


def test_a_pose_follows_seed_film_and_condition_alone() -> None:
    poses = {(condition, key, seed): pose_of(condition, key, 80, 100, seed) for condition in CONDITIONS for key in "ab" for seed in (0, 1)}
    assert all(pose_of(condition, key, 80, 100, seed) == pose for (condition, key, seed), pose in poses.items())
    assert len(set(poses.values())) == 1 + 2 * 4, "one for all plain films, one for each of the others"


def test_what_leaves_the_square_is_black() -> None:
    moved = Pose(shift_x=1.0).moved_image(np.ones((32, 32), dtype=np.float32))
    assert moved[:, :15].max() == 0
    assert moved[:, 17:].min() == 1
