"""Prediction on files: one result or one reason for each, names kept out, run again does only what is missing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from tiny_model import encoded_film, tiny_model_folder

from ray_jobs.predict import run_predict
from ssacl.errors import CheckpointError, DataError
from ssacl.inference.files import Predictor, find_inputs
from ssacl.inference.generator import GenerationOptions

FAST = GenerationOptions(num_beams=1, max_new_tokens=8, max_batch_size=3)
SECRET = "DOE-JOHN-1955"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films" / SECRET
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(encoded_film("PNG", seed=1))
    (folder / "b.JPG").write_bytes(encoded_film("JPEG", seed=2))
    (folder / "c.dcm").write_bytes(encoded_film("DICOM", seed=3))
    (folder / "copy of c").write_bytes((folder / "c.dcm").read_bytes())
    (folder / "empty.png").write_bytes(b"")
    (folder / "truncated.png").write_bytes(encoded_film("PNG")[:300])
    (folder / "text.dcm").write_bytes(b"The patient has " * 20)
    (folder / "notes.txt").write_bytes(b"left out: not a picture's suffix")
    (folder / ".hidden.png").write_bytes(b"left out")
    return tmp_path / "films"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_result_or_one_reason_each(model: Path, films: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = run_predict(str(model), [films], out, FAST, overlays=True)
    assert (summary.num_results, summary.num_rejects) == (4, 3)
    assert "4 drafts and 3 rejects of 7 inputs" in summary.describe()
    results, rejects = lines(out / "results.jsonl"), lines(out / "rejects.jsonl")
    assert len(results) == 3  # the copy of c is the same picture
    assert all(reject["reason"] for reject in rejects)
    assert {reject["reason"].split(".")[0] for reject in rejects} == {
        "The file is empty",
        "The file is damaged or truncated, or its compression cannot be decoded",
        "The file is named as DICOM but is none",
    }
    with (out / "inputs.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [row["outcome"] for row in rows] == ["result", "result", "result", "result", "reject", "reject", "reject"]
    assert rows[2]["id"] == rows[3]["id"]
    for result in results:
        whole = json.loads((out / "results" / f"{result['id']}.json").read_text())
        assert len(whole["anatomy_maps"]) == 32
        assert whole["findings"] == result["findings"]
        assert (out / "overlays" / f"{result['id']}.png").read_bytes().startswith(b"\x89PNG")
    named = [path for path in out.rglob("*") if path.is_file() and path.name not in ("inputs.csv",)]
    assert not [path for path in named if SECRET in str(path.relative_to(out)) or SECRET.encode() in path.read_bytes()]
    assert not [path for path in named if path.name.startswith(".")]


def test_again_does_only_what_is_missing(model: Path, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = run_predict(str(model), [films], out, FAST)
    results = sorted((out / "results").iterdir())
    before = {path: path.stat().st_mtime_ns for path in results}
    results[0].unlink()
    asked: list[str] = []
    predict = Predictor.predict
    monkeypatch.setattr(Predictor, "predict", lambda self, paths: asked.extend(paths) or predict(self, paths))
    second = run_predict(str(model), [films], out, FAST)
    assert second.outcomes == first.outcomes
    assert 0 < second.num_resumed < 4
    assert results[0].is_file()
    assert {path: path.stat().st_mtime_ns for path in results[1:]} == {path: before[path] for path in results[1:]}
    assert len(asked) == 7 - second.num_resumed


def test_another_model_or_setting_is_refused(model: Path, films: Path, tmp_path: Path) -> None:
    run_predict(str(model), [films / SECRET / "a.png"], tmp_path / "out", FAST)
    with pytest.raises(DataError, match="another model or other settings"):
        run_predict(str(model), [films], tmp_path / "out", FAST.model_copy(update={"num_beams": 2}))


def test_inputs_that_are_not_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file or folder"):
        find_inputs([tmp_path / "nothing"])
    with pytest.raises(DataError, match="No DICOM, PNG or JPEG"):
        run_predict(str(model), [tmp_path], tmp_path / "out", FAST)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_leaves_nothing(films: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run_predict(str(tmp_path / "no-model"), [films], tmp_path / "out", FAST)
    assert not list((tmp_path / "out").rglob("*.json*"))


@pytest.mark.ray
@pytest.mark.slow
def test_on_actors_the_same(model: Path, films: Path, tmp_path: Path) -> None:
    alone = run_predict(str(model), [films], tmp_path / "alone", FAST.model_copy(update={"max_batch_size": 1}))
    together = run_predict(str(model), [films], tmp_path / "together", FAST.model_copy(update={"max_batch_size": 1}), num_workers=2)
    assert together.outcomes == alone.outcomes
    for path in (tmp_path / "alone" / "results").iterdir():
        one, other = (json.loads((tmp_path / name / "results" / path.name).read_text()) for name in ("alone", "together"))
        assert one["text"] == other["text"]


REAL = Path(__file__).parents[2] / "shared" / "data" / "real"


@pytest.mark.skipif(not (REAL / "dicom").is_dir(), reason="the shared real films are not beside the checkout")
def test_real_films_and_dicom_files(model: Path, tmp_path: Path) -> None:
    inputs = [REAL / "dicom", *sorted((REAL / "images").iterdir())[:6]]
    summary = run_predict(str(model), inputs, tmp_path / "out", FAST)
    assert len(summary.outcomes) == 9
    reasons = {Path(outcome.path).name: outcome.reason for outcome in summary.outcomes}
    assert reasons["siim_cr_pa_jpegbaseline_mono2.dcm"] == ""
    assert reasons["siim_cr_pa_jpegbaseline_mono1_relabelled.dcm"] == ""
    assert reasons["veterinary_dx_mono1_lateral_dog.dcm"] != ""
