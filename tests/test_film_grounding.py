"""Scores of maps on annotated films: figures worked out by hand, layouts and what is wrong in them, the command, the supervised bound."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score
from tiny_model import film, tiny_model_folder

from ssacl.cli import main
from ssacl.errors import DataError
from ssacl.evaluation.annotation_layouts import read_annotations
from ssacl.evaluation.conditions import CONDITIONS
from ssacl.evaluation.film_grounding import groups_of, score_group
from ssacl.evaluation.film_scores import score_maps
from ssacl.evaluation.lung_landmarks import LANDMARKS, lung_landmarks
from ssacl.evaluation.lung_segmenter import segmenter_answers

SIDE = 64


def _save(path: Path, pixels: NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def _lungs(number: int) -> dict[str, NDArray[np.bool_]]:
    """Two upright boxes that stand elsewhere and are of another size on each film; the patient's right lung is on the image's left."""
    rng = np.random.default_rng(number)
    top, left, height = rng.integers(4, 22), rng.integers(4, 14), rng.integers(24, 36)
    masks = {name: np.zeros((SIDE, SIDE), dtype=bool) for name in ("right_lung", "left_lung")}
    masks["right_lung"][top : top + height, left : left + 16] = True
    masks["left_lung"][top : top + height, left + 26 : left + 42] = True
    return masks


def _mask_tree(root: Path, num_films: int, num_patients: int = 99) -> Path:
    """`images/` and `masks/LABEL/` of films on which the lungs are dark."""
    with_patients = [["file", "patient_group"]]
    for number in range(num_films):
        name, masks = f"{number:02d}.png", _lungs(number)
        picture = np.full((SIDE, SIDE), 190) + np.random.default_rng(number).integers(-8, 9, (SIDE, SIDE))
        picture[masks["right_lung"] | masks["left_lung"]] -= 130
        _save(root / "images" / name, picture)
        for label, mask in masks.items():
            _save(root / "masks" / label / name, mask * 255)
        with_patients.append([name, f"patient {number % num_patients}"])
    with (root / "images.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(with_patients)
    return root


def test_figures_of_a_small_map_are_those_worked_out_by_hand() -> None:
    a_map, mask = np.zeros((4, 4), dtype=np.float32), np.zeros((4, 4), dtype=bool)
    a_map[0, 0], a_map[0, 1], a_map[1, 0] = 1.0, 0.5, 0.5
    mask[0, :2] = True
    scores = score_maps(np.stack([a_map] * 2), np.stack([mask] * 2), np.array([0, 1]), ["a", "b"])
    # Cut below .5 three pixels stay, two of them in the mask; at .5 (the map has 256 levels) the maximum alone.
    assert [scores.means[f"iou_at_{level}"] for level in (0.1, 0.4, 0.5)] == pytest.approx([2 / 3, 2 / 3, 1 / 2])
    assert scores.means["mean_iou"] == pytest.approx((4 * 2 / 3 + 1 / 2) / 5)
    assert scores.means["iou_best"] == scores.means["iou"] == pytest.approx(2 / 3)
    # Inside 1 and .5; outside one .5 and thirteen zeros.
    inside, outside = (0.75, 0.0625), (0.5 / 14, 0.25 / 14 - (0.5 / 14) ** 2)
    assert scores.means["cnr"] == pytest.approx((inside[0] - outside[0]) / (inside[1] + outside[1]) ** 0.5, rel=1e-5)
    assert scores.means["average_precision"] == pytest.approx(average_precision_score(mask.ravel(), a_map.ravel()), abs=1e-6)
    assert scores.means["pointing"] == 1.0
    # Pixel centres of four lie at -.75, -.25, .25, .75: the map's mean is (-.625, -.625), the mask's (-.5, -.75).
    assert scores.means["centroid_error"] == pytest.approx(np.hypot(0.125, 0.125))
    away = score_maps(np.stack([a_map[::-1, ::-1]] * 2), np.stack([mask] * 2), np.array([0, 1]), ["a", "b"])
    assert (away.means["pointing"], away.means["iou_best"]) == (0.0, pytest.approx(2 / 16))
    assert away.means["cnr_signed"] == pytest.approx(-away.means["cnr"])


def test_landmarks_of_two_boxes() -> None:
    masks = np.zeros((2, 100, 100), dtype=bool)
    masks[0, 20:80, 10:40], masks[1, 20:80, 60:90] = True, True
    points = dict(zip(LANDMARKS, lung_landmarks(*masks), strict=True))
    assert points["right apex"] == pytest.approx([-0.5, -0.59])
    assert points["left middle third"] == pytest.approx([0.5, 0.0])
    assert points["right costophrenic corner"] == pytest.approx([-0.79, 0.59])
    assert points["left costophrenic corner"] == pytest.approx([0.79, 0.59])


def _spoil_size(root: Path) -> None:
    _save(root / "masks" / "left_lung" / "00.png", np.ones((SIDE, SIDE + 1)) * 255)


def _spoil_empty(root: Path) -> None:
    _save(root / "masks" / "left_lung" / "00.png", np.zeros((SIDE, SIDE)))


def _spoil_label(root: Path) -> None:
    _save(root / "masks" / "flux capacitor" / "00.png", np.ones((SIDE, SIDE)) * 255)


def _spoil_image(root: Path) -> None:
    (root / "images" / "00.png").write_bytes(b"no picture")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "another size": (_spoil_size, "mask of another size than its image: 1"),
    "empty": (_spoil_empty, "empty mask: 1"),
    "unknown label": (_spoil_label, r"unknown label: 1\. Unknown labels: 'flux capacitor' \(1\)"),
    "unreadable": (_spoil_image, "unreadable image: 2"),
    "missing": (lambda root: (root / "images" / "00.png").unlink(), "missing image: 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_masks_are_refused_with_counts_or_left_out_and_counted(tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(_mask_tree(tmp_path, 3))
    with pytest.raises(DataError, match=message):
        read_annotations(tmp_path)
    found = read_annotations(tmp_path, leave_out_bad=True)
    assert sum(found.left_out.values()) == int(message.split(": ")[1][0])
    assert sum(len(each.targets) for each in found.films) == 6 - (0 if case == "unknown label" else sum(found.left_out.values()))


def _coco(root: Path, boxes: Sequence[tuple[int, Sequence[float]]]) -> Path:
    _save(root / "images" / "a.png", film(SIDE, SIDE, 1))
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE}],
        "categories": [{"id": 7, "name": "Pneumothorax"}],
        "annotations": [{"image_id": image, "category_id": 7, "bbox": list(box)} for image, box in boxes],
    }
    (root / "boxes.json").write_text(json.dumps(tree))
    return root


def test_boxes_of_a_coco_file(tmp_path: Path) -> None:
    found = read_annotations(_coco(tmp_path, [(1, [4, 4, 20, 10]), (1, [40.5, 50, 24, 14])]))
    assert (found.layout, found.patients_known, len(found.films)) == ("COCO", False, 1)
    (target,) = found.films[0].targets
    assert (target.asked.words, [(box.x0, box.y1) for box in target.boxes]) == ("pneumothorax", [(4, 14), (40.5, 64)])
    bad = [(1, [4, 4, 20, 10]), (1, [50, 50, 30, 10]), (1, [9, 9, 0, 5]), (2, [1, 1, 2, 2])]
    with pytest.raises(DataError, match="annotation of no listed image: 1; box outside of the image: 1; box without area: 1"):
        read_annotations(_coco(tmp_path, bad))
    assert len(read_annotations(_coco(tmp_path, bad), leave_out_bad=True).films[0].targets[0].boxes) == 1


def test_the_command_scores_every_condition_beside_its_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    data, model = _mask_tree(tmp_path / "data", 6), tiny_model_folder(tmp_path / "model")
    command = ["evaluate", "grounding", "--checkpoint", str(model), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*command, "--trained-films", "mark"]) == 0
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert list(card["groups"]) == list(card["landmarks"]) == list(CONDITIONS)
    for condition, groups in card["groups"].items():
        assert list(groups) == ["right lung (mask)", "left lung (mask)"]
        systems = set(groups["right lung (mask)"]["systems"])
        assert systems == {"model", "model_registered", "average_mask", "centre", "random"} | (
            set() if condition == "plain" else {"atlas_true_pose"}
        )
    atlas = {name: card["groups"]["affine"]["right lung (mask)"]["systems"][name]["iou"] for name in ("average_mask", "atlas_true_pose")}
    assert atlas["atlas_true_pose"] > atlas["average_mask"], "an atlas that is told the pose lies better"
    assert card["data"]["num_patients"] == 6
    assert (tmp_path / "out" / "cases.png").stat().st_size > 1000
    assert "patient 0" not in (tmp_path / "out" / "scorecard.json").read_text()
    answers = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "answers").iterdir()}
    assert len(answers) == 6 * len(CONDITIONS)
    assert main([*command, "--trained-films", "mark"]) == 0
    assert answers == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "answers").iterdir()}, (
        "kept answers are not made again"
    )
    assert main([*command, "--conditions", "plain,upside down"]) == 1
    assert "conditions plain, affine, crop" in capsys.readouterr().err


def test_a_net_that_saw_masks_of_other_patients_finds_the_lungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("ssacl.evaluation.lung_segmenter.SIDE_PX", 32)
    films = read_annotations(_mask_tree(tmp_path, 16, num_patients=2)).films
    result = score_group(films, groups_of(films)[0], "affine", {"supervised": segmenter_answers(films, ("affine",), num_steps=60)})
    assert result is not None
    figures = {name: scores.means["iou"] or 0.0 for name, scores in result.systems.items()}
    assert figures["supervised"] > figures["average_mask"] + 0.1
