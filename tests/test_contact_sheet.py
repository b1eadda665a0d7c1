"""`ssacl data show` and `ssacl data deidentify`: what a user sees of a data set, and of films without identifiers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from dicom_files import dicom, film
from PIL import Image

from ssacl.cli import main
from ssacl.data.contact_sheet import TILE_PX, contact_sheet
from ssacl.data.ingest import IngestSettings, run_local
from ssacl.data.storage import open_storage
from ssacl.errors import DataError


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five studies; the films differ, so that their tiles do."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(5):
        study = folder / "train" / f"p{number}" / "s"
        study.mkdir(parents=True)
        pixels = np.clip(film(64).astype(int) // (number + 1), 0, 255).astype(np.uint16) << 8
        window = {"WindowCenter": 32768, "WindowWidth": 65536}
        (study / "1.dcm").write_bytes(dicom(pixels, 16, PatientID=f"p{number}", **window))
        (study / "report.txt").write_text("FINDINGS: Small left pleural effusion.")
    return folder


@pytest.mark.parametrize("bits", [8, 16])
def test_each_sample_is_a_tile_as_bright_as_its_film(bits: int, films: Path, tmp_path: Path) -> None:
    run_local("dicom-dir", films, str(tmp_path / "set"), IngestSettings(key_secret="a secret of the tests", bits=bits))
    storage = open_storage(tmp_path / "set")
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(storage, num_columns=5))))
    assert sheet.shape[1] == 5 * TILE_PX
    tiles = [sheet[2 : 2 + 60, place * TILE_PX + 2 : place * TILE_PX + 62].mean() for place in range(5)]
    expected = [film(64).mean() / (number + 1) for number in range(5)]
    assert sorted(tiles) == pytest.approx(sorted(expected), abs=8)
    # The caption of two lines below each.
    assert all(sheet[TILE_PX:, place * TILE_PX : (place + 1) * TILE_PX].max() > 128 for place in range(5))
    two = np.asarray(Image.open(io.BytesIO(contact_sheet(storage, num_samples=2))))
    assert two.shape[1] == 2 * TILE_PX
    with pytest.raises(DataError, match=r"The split val .* is empty"):
        contact_sheet(storage, split="val")


def test_the_commands(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSACL_KEY_SECRET", "a secret of the tests")
    ingest = ["data", "ingest", "--format", "dicom-dir", str(films), "--out", str(tmp_path / "set"), "--num-workers", "0"]
    assert main([*ingest, "--bits", "16", "--blank-text"]) == 0
    assert main(["data", "show", str(tmp_path / "set"), "--out", str(tmp_path / "sheet.png"), "--num-samples", "3"]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] == 3 * TILE_PX
    assert main(["data", "deidentify", str(films), str(tmp_path / "clean")]) == 0
    said = capsys.readouterr().out
    assert "5 films written" in said
    assert "not_a_picture 5" in said
    assert len(list((tmp_path / "clean").rglob("*.dcm"))) == 5


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["data", "show", "{tmp}/nothing", "--out", "{tmp}/x.png"], "No data set"),
        (["data", "show", "{tmp}/nothing", "--out", "{tmp}/x.png", "--split", "holdout"], "choose one of train, val, test"),
        (["data", "deidentify", "{tmp}/nothing", "{tmp}/clean"], "nothing at"),
        (["data", "ingest", "--format", "dicomweb", "http://127.0.0.1:9", "--query", "PatientName", "--out", "{tmp}/set"], "NAME=VALUE"),
        (["data", "ingest", "--format", "mimic-cxr", "{tmp}", "--out", "{tmp}/set", "--num-workers", "0"], "No files/pNN"),
    ],
)
def test_wrong_input_is_one_line(
    command: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSACL_KEY_SECRET", "a secret of the tests")
    assert main([part.format(tmp=tmp_path) for part in command]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ssacl: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_film_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("none")
    assert main(["data", "deidentify", str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "0 films written" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
