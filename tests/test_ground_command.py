"""`ssacl ground`: files that it writes, what it says, and wrong inputs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import encoded_film, tiny_model_folder

from ssacl.cli import main
from ssacl.data.dicom import read_picture
from ssacl.errors import ConfigError
from ssacl.inference.generator import ReportGenerator
from ssacl.inference.phrase_sheet import phrase_sheet_png


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ground")
    tiny_model_folder(folder / "model")
    (folder / "film.png").write_bytes(encoded_film("PNG", 160, 120, 0))
    return folder


def _run(place: Path, *phrases: str, film: str = "film.png", out: str = "out") -> int:
    return main(["ground", "--checkpoint", str(place / "model"), "--film", str(place / film), "--out", str(place / out), *phrases])


def test_maps_boxes_and_a_picture_are_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(place, "left pleural effusion", "carina", "a purple elephant") == 0
    tree = json.loads((place / "out.json").read_text())
    assert tree["status"] == "preliminary"
    assert [answer["phrase"] for answer in tree["phrases"]] == ["left pleural effusion", "carina", "a purple elephant"]
    assert tree["phrases"][0]["finding"] == "Pleural Effusion"
    assert tree["phrases"][1]["anatomy"] == ["carina"]
    assert tree["phrases"][2]["names_nothing"]
    assert all(np.sum(answer["evidence"]) == pytest.approx(1.0, abs=0.01) for answer in tree["phrases"])
    assert Image.open(place / "out.png").size[0] > 900
    said = " ".join(capsys.readouterr().out.split())
    assert "Not a medical device" in said
    assert not list(place.glob(".*"))


def test_wrong_inputs_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "text.png").write_text("not a picture")
    for arguments, message in (
        ({"film": "absent.png"}, "cannot be read"),
        ({"film": "text.png"}, "neither DICOM, PNG nor JPEG"),
        ({"out": "nowhere/out"}, "Cannot write to"),
    ):
        assert _run(place, "carina", **arguments) == 1
        assert message in capsys.readouterr().err, arguments
    assert _run(place, " ") == 1
    assert "as in 'left pleural effusion'" in capsys.readouterr().err


def test_a_sheet_has_a_panel_for_each_phrase_and_none_is_refused(place: Path) -> None:
    picture = read_picture((place / "film.png").read_bytes(), "film.png")
    answers = ReportGenerator.load(place / "model").ground(picture, ["carina", "spine", "abdomen", "left lung"])
    one, four = (Image.open(io.BytesIO(phrase_sheet_png(picture.pixels, some))) for some in (answers[:1], answers))
    assert four.width > 2 * one.width
    assert four.height > 1.5 * one.height
    with pytest.raises(ConfigError, match="at least one phrase"):
        phrase_sheet_png(picture.pixels, [])
