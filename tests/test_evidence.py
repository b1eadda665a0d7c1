"""Maps land on the right pixels, boxes bound them, pictures are upright and say what they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ssacl.anatomy import FINDINGS, NODE_INDEX, NODES
from ssacl.errors import ConfigError
from ssacl.inference.evidence import evidence_sheet_png, overlay_png
from ssacl.inference.maps import box_of_map, map_on_picture, normalised_map, restrict_to_picture
from ssacl.inference.report import Box, DraftReport, Finding, Sentence

GRID = 14
TEXTS = (
    ("Moderate left pleural effusion with adjacent atelectasis.", ("left costophrenic angle",), "Pleural Effusion", "present"),
    ("The heart is mildly enlarged.", ("cardiac silhouette",), "Cardiomegaly", "present"),
    ("No pneumothorax.", ("right apical zone", "left apical zone"), "Pneumothorax", "absent"),
)


def spot(row: int, column: int) -> np.ndarray:
    raw = np.zeros((GRID, GRID))
    raw[row, column] = 1.0
    return raw


def padded_frame(width: int, height: int) -> Box:
    side = max(width, height)
    return Box(-(side - width) / 2, -(side - height) / 2, (width + side) / 2, (height + side) / 2)


def make_report(width: int, height: int, cells: list[tuple[int, int]], texts=TEXTS) -> DraftReport:
    frame = padded_frame(width, height)
    sentences = []
    for (text, nodes, finding, status), cell in zip(texts, cells, strict=True):
        grid_map = normalised_map(spot(*cell))
        sentences.append(Sentence(text, nodes, finding, status, 0.8, box_of_map(grid_map, frame, width, height), grid_map))
    return DraftReport(
        sentences=tuple(sentences),
        findings=tuple(Finding(name, 0.05 * place, 0.4, 0.05 * place >= 0.4) for place, name in enumerate(FINDINGS)),
        anatomy_groups=("lungs",),
        anatomy_maps=np.stack([normalised_map(spot(index % GRID, index // GRID)) for index in range(len(NODES))]),
        image_width_px=width,
        image_height_px=height,
        map_frame=frame,
        image_ref="0" * 64,
        model_version="test",
    )


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.mark.parametrize("raw", [np.full((4, 4), np.nan), np.zeros((4, 4)), -np.ones((4, 4)), np.full((4, 4), np.inf)])
def test_a_map_without_mass_is_uniform(raw: np.ndarray) -> None:
    assert normalised_map(raw) == pytest.approx(np.full((4, 4), 1 / 16))


def test_not_a_number_does_not_spread() -> None:
    raw = spot(5, 5)
    raw[0, 0] = np.nan
    assert np.array_equal(normalised_map(raw), normalised_map(spot(5, 5)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, GRID - 2), st.integers(1, GRID - 2), st.integers(60, 600), st.integers(60, 600))
def test_a_cell_lands_where_the_square_was_cut(row: int, column: int, width: int, height: int) -> None:
    frame = padded_frame(width, height)
    x = frame.x0 + (column + 0.5) / GRID * (frame.x1 - frame.x0)
    y = frame.y0 + (row + 0.5) / GRID * (frame.y1 - frame.y0)
    if not (0 < x < width and 0 < y < height):
        return
    image = map_on_picture(spot(row, column), frame, width, height)
    assert image.shape == (height, width)
    ys, xs = np.nonzero(image > 0.9 * image.max())
    assert abs(xs.mean() + 0.5 - x) <= 1.5 + 0.02 * max(width, height)
    assert abs(ys.mean() + 0.5 - y) <= 1.5 + 0.02 * max(width, height)
    box = box_of_map(spot(row, column), frame, width, height)
    assert box is not None
    assert box.x0 < x < box.x1
    assert box.y0 < y < box.y1
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width + 1e-6
    assert box.y1 <= height + 1e-6


def test_a_cropped_frame_leaves_the_rest_of_the_picture_to_its_border_cells() -> None:
    frame = Box(50, 0, 150, 100)  # the central square of a 200 x 100 picture
    image = map_on_picture(spot(7, 7), frame, 200, 100)
    _, x = np.unravel_index(image.argmax(), image.shape)
    assert abs(x + 0.5 - (50 + 7.5 / GRID * 100)) < 2
    assert image[:, :50].max() == 0


def test_box_takes_the_part_with_the_maximum() -> None:
    two = normalised_map(spot(2, 2) + 0.9 * spot(11, 11), sigma_cells=0.7)
    box = box_of_map(two, Box(0, 0, 140, 140), 140, 140, mass_share=0.6)
    assert box is not None
    assert box.x1 < 70
    assert box.y1 < 70


def test_a_flat_map_has_no_box() -> None:
    assert box_of_map(np.full((GRID, GRID), 1.0), Box(0, 0, 100, 100), 100, 100) is None


def test_padding_holds_no_evidence() -> None:
    frame = padded_frame(70, 140)
    kept = restrict_to_picture(np.ones((GRID, GRID)), frame, 70, 140)
    assert kept[:, :3].max() == 0
    assert kept[:, 4:10].min() == pytest.approx(1)
    assert kept[0, 3] == pytest.approx(0.5)  # the picture's edge goes through this column


def test_overlay_is_upright_and_at_the_cell() -> None:
    width, height = 420, 560
    film = np.full((height, width), 60, dtype=np.uint8)
    report = make_report(width, height, [(2, 4), (11, 9), (7, 7)])
    index = 22  # make_report points node 22 at row 22 % 14 = 8, column 22 // 14 = 1, which is on the picture's left edge
    picture = decoded(overlay_png(film, report, node=NODES[index]))
    assert picture.shape[0] > height  # the banner stands below the film, not on it
    light = picture[: height - 1].sum(axis=2)[60:]  # below the side marks
    ys, xs = np.nonzero(light >= np.percentile(light, 99))
    frame = report.map_frame
    assert abs(ys.mean() + 60 - (frame.y0 + (index % GRID + 0.5) / GRID * 560)) < 12
    assert xs.mean() < 60


def test_each_sentence_has_its_own_overlay() -> None:
    film = np.full((560, 420), 60, dtype=np.uint8)
    report = make_report(420, 560, [(2, 4), (11, 9), (7, 7)])
    assert overlay_png(film, report, sentence_index=0) != overlay_png(film, report, sentence_index=1)


def test_overlay_of_a_node_and_of_nothing_chosen() -> None:
    film = np.tile(np.arange(200, dtype=np.uint16) * 300, (100, 1))
    report = make_report(200, 100, [(5, 5), (8, 8), (3, 3)])
    assert overlay_png(film, report, node="carina") != overlay_png(film, report, node="left lung")
    assert decoded(overlay_png(film, report)).shape[1] == 200


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"sentence_index": 3}, "has 3"), ({"node": "spleen"}, "spleen"), ({"sentence_index": 0, "node": "carina"}, "not for both")],
)
def test_overlay_refuses_what_is_not_there(choice: dict, message: str) -> None:
    report = make_report(50, 50, [(5, 5), (8, 8), (3, 3)])
    with pytest.raises(ConfigError, match=message):
        overlay_png(np.zeros((50, 50), np.uint8), report, **choice)


def test_another_picture_is_refused() -> None:
    report = make_report(50, 60, [(5, 5), (8, 8), (3, 3)])
    with pytest.raises(ConfigError, match="pass the picture"):
        overlay_png(np.zeros((50, 60), np.uint8), report)


@pytest.mark.parametrize("texts", [(), TEXTS, tuple((text * 8 + " $x_1^{ \u4e2d\n", *rest) for text, *rest in TEXTS)])
def test_sheet_draws_any_draft(texts: tuple) -> None:
    film = np.tile(np.linspace(0, 255, 90).astype(np.uint8), (120, 1))
    report = make_report(90, 120, [(5, 5), (8, 8), (3, 3)][: len(texts)], texts)
    picture = decoded(evidence_sheet_png(film, report))
    assert picture.shape[1] == 1350
    assert picture.std() > 10


def test_json_holds_maps_and_frame() -> None:
    tree = make_report(90, 120, [(5, 5), (8, 8), (3, 3)]).to_json()
    assert tree["map_frame"] == {"x0": -15.0, "y0": 0.0, "x1": 105.0, "y1": 120.0}
    assert np.asarray(tree["anatomy_maps"]).shape == (len(NODE_INDEX), GRID, GRID)
    assert tree["status"] == "preliminary"
