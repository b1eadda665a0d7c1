"""`ssacl finetune segment`: run lengths and Dice by hand, masks that stay on their films, decoders that learn, and the card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from downstream_trees import SIDE_PX, square_mask, write_mask_folders, write_siim
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_model import tiny_model_folder

from ssacl.cli import main
from ssacl.errors import ConfigError, DataError
from ssacl.evaluation.downstream import epochs
from ssacl.evaluation.downstream.epochs import Schedule
from ssacl.evaluation.downstream.films import UNKNOWN, FilmReader, TaskFilm
from ssacl.evaluation.downstream.mask_layouts import read_masks
from ssacl.evaluation.downstream.overlap import THRESHOLDS, best_threshold, dice, dice_at_thresholds
from ssacl.evaluation.downstream.run_length import decode, encode
from ssacl.evaluation.downstream.segment import SegmentOptions, _gains, segment
from ssacl.evaluation.scorecard import read_card

FAST = Schedule(num_epochs=2, batch_size=8, head_lr=1e-2, lr=1e-3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def siim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_siim(tmp_path_factory.mktemp("segment") / "siim")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mask_folders(tmp_path_factory.mktemp("segment") / "masks")


def all_films(task_splits: dict[str, tuple[TaskFilm, ...]]) -> list[TaskFilm]:
    return [film for films in task_splits.values() for film in films]


def test_run_lengths_by_hand() -> None:
    # Width 3, height 2, counted down the columns: skip 1, take 2, skip 2, take 1.
    assert decode("1 2 2 1", 3, 2).tolist() == [[False, True, False], [True, False, True]]
    assert encode(np.array([[False, True, False], [True, False, True]])) == "1 2 2 1"
    assert not decode(" -1", 3, 2).any()
    assert encode(np.zeros((2, 3), bool)) == "-1"
    assert decode("0 6", 3, 2).all()


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 7))))
def test_run_lengths_come_back(mask: np.ndarray) -> None:
    assert (decode(encode(mask), mask.shape[1], mask.shape[0]) == mask).all()


@pytest.mark.parametrize(
    ("runs", "message"),
    [("1", "pairs"), ("1 x", "pairs"), ("1 -2", "negative"), ("", "none at all"), ("4 3", "beyond its picture of 3 x 2")],
)
def test_damaged_run_lengths_are_named(runs: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(runs, 3, 2)


def test_dice_by_hand() -> None:
    truth = np.zeros((4, 4, 4), bool)
    truth[0, :2, :2] = truth[1, :2, :2] = truth[2, :2, :2] = True
    found = np.zeros_like(truth)
    found[0, :2, :2] = found[1, 1:3, :2] = True
    # The same; half of each; missed; both empty.
    assert dice(found, truth).tolist() == [1.0, 0.5, 0.0, 1.0]
    assert dice(truth, found).tolist() == [1.0, 0.5, 0.0, 1.0]
    probability = np.full((1, 1, 2, 2), 0.45, np.float32)
    probability[..., 0] = 0.65
    by_threshold = dice_at_thresholds(probability, np.array([[[[True, False], [True, False]]]]))
    assert by_threshold[:, 0, 0].tolist() == pytest.approx([2 / 3, 2 / 3, 1, 1, 0])
    assert THRESHOLDS[best_threshold(by_threshold, np.array([[True]]))[0]] == 0.5


def test_dice_equals_torchmetrics() -> None:
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    rng = np.random.default_rng(0)
    found, truth = rng.random((12, 3, 8, 8)) < 0.4, rng.random((12, 3, 8, 8)) < 0.3
    score = segmentation.DiceScore(num_classes=3, average="none", input_format="one-hot")
    expected = score(torch.from_numpy(found).int(), torch.from_numpy(truth).int())
    assert dice(found, truth).mean(0).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_siim_films_masks_and_patients(siim: Path) -> None:
    masks = read_masks(siim)
    films = all_films(dict(masks.task.splits))
    assert (masks.task.layout, masks.task.names, len(films)) == ("siim", ("pneumothorax",), 24)
    assert sum(film.labels[0] for film in films) == 16
    assert len({film.patient for film in films}) == 12
    for film in films:
        number = int(film.id.rpartition(".")[2])
        expected = square_mask(number) if number % 3 else np.zeros((SIDE_PX, SIDE_PX), bool)
        assert (masks.masks(film, SIDE_PX)[0] == expected).all(), number
        assert "patient" not in film.patient


def test_a_mask_turns_with_its_film(siim: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(siim, tmp_path / "siim"))
    path = next(folder.rglob("*.8323329.1.dcm"))
    ds = pydicom.dcmread(path)
    # Filmed from the other side: rows run to the patient's right, so that the film is mirrored to be read.
    ds.PatientOrientation = ["R", "F"]
    ds.save_as(path)
    masks = read_masks(folder)
    film = next(film for film in all_films(dict(masks.task.splits)) if film.id.endswith(".1"))
    mask = masks.masks(film, SIDE_PX)[0]
    assert (mask == square_mask(1)[:, ::-1]).all()
    assert FilmReader().square(film, SIDE_PX)[mask].min() > 0.9, "the white square lies under its mask"


def test_mask_folders_know_what_is_not_drawn(drawn: Path) -> None:
    masks = read_masks(drawn)
    assert masks.task.names == ("left lung", "right lung")
    films = all_films(dict(masks.task.splits))
    assert len(films) == 20
    assert sum(film.labels[0] == UNKNOWN for film in films) == 10
    odd = next(film for film in films if film.id == "3.png")
    assert (masks.masks(odd, SIDE_PX) == np.stack([~square_mask(3), square_mask(3)])).all()
    assert len(all_films(dict(read_masks(drawn, ("left lung",)).task.splits))) == 10


def test_a_decoder_learns_where_the_square_is(model: Path, drawn: Path, tmp_path: Path) -> None:
    counted: list[int] = []
    schedule = Schedule(num_epochs=8, batch_size=4, head_lr=1e-2)
    card = segment(
        model, drawn, tmp_path, SegmentOptions(structures=("right lung",), schedule=schedule), start=counted.append, progress=counted.append
    )
    assert counted[0] == sum(counted[1:]) == 2 * 8 * card["data"]["films"]["train"]
    assert card == read_card(tmp_path)
    systems = {name: each["figures"]["dice_right_lung"] for name, each in card["details"]["systems"].items()}
    assert set(systems) == {"model", "raw_pixels", "mean_mask"}
    assert systems["model"] == card["metrics"]["dice_right_lung"]
    assert systems["model"] > systems["mean_mask"]
    assert systems["raw_pixels"] > 0.7
    assert card["rows"][0]["baseline"] == max(systems["raw_pixels"], systems["mean_mask"])
    chosen = card["details"]["systems"]["model"]["chosen_on_val"]
    assert chosen["best_epoch"] == 1 + int(np.argmax(chosen["val_dice_by_epoch"]))
    page = (tmp_path / "scorecard.html").read_text()
    assert page.count("data:image/png;base64") == 3
    assert not re.search(r"\d+\.png", page + (tmp_path / "scorecard.json").read_text())


def test_an_interrupted_run_goes_on_and_the_encoder_may_be_trained(
    model: Path, siim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = SegmentOptions(mode="full", schedule=FAST)
    whole = segment(model, siim, tmp_path / "whole", options)
    frozen = segment(model, siim, tmp_path / "frozen", SegmentOptions(schedule=FAST))
    assert whole["metrics"]["dice_mean"] != frozen["metrics"]["dice_mean"]
    assert whole["details"]["systems"]["raw_pixels"] == frozen["details"]["systems"]["raw_pixels"]
    assert whole["metrics"]["dice_where_drawn_pneumothorax"] is not None
    gain = whole["metrics"]["dice_mean"] - whole["details"]["systems"]["raw_pixels"]["figures"]["dice_mean"]
    assert whole["metrics"]["dice_gain_mean"] == pytest.approx(gain)
    assert whole["metrics"]["dice_gain_pneumothorax"] == pytest.approx(gain)
    low, high = whole["intervals"]["dice_gain_mean"]
    assert low <= gain <= high
    monkeypatch.setattr(epochs, "write_whole", stopping_after(1, epochs.write_whole))
    with pytest.raises(KeyboardInterrupt):
        segment(model, siim, tmp_path / "cut", options)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "scorecard.json").exists()
    assert segment(model, siim, tmp_path / "cut", options) == whole
    with pytest.raises(DataError, match="another evaluation"):
        segment(model, siim, tmp_path / "cut", SegmentOptions(schedule=FAST))


def stopping_after(count: int, write: Callable[[Path, bytes], None]) -> Callable[[Path, bytes], None]:
    written: list[Path] = []

    def stop(path: Path, content: bytes) -> None:
        write(path, content)
        written.append(path)
        if len(written) == count:
            raise KeyboardInterrupt

    return stop


def test_bad_sets_are_named(model: Path, siim: Path, drawn: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(siim, tmp_path / "siim"))
    lost = next(folder.rglob("*.8323329.1.dcm"))
    lost.unlink()
    next(folder.rglob("*.8323329.2.dcm")).write_bytes(b"nothing")
    with pytest.raises(DataError, match="missing image: 1; unreadable image: 1"):
        read_masks(folder)
    assert read_masks(folder, leave_out_bad=True).task.left_out == {"missing image": 1, "unreadable image": 1}
    table = folder / "train-rle.csv"
    table.write_text(table.read_text() + "1.2.276.0.7230010.3.1.4.8323329.4,-1\n")
    with pytest.raises(DataError, match="of 1 films that they have a mask and that they have none"):
        read_masks(folder, leave_out_bad=True)
    (folder / "more-rle.csv").write_text("")
    with pytest.raises(DataError, match="2 tables"):
        read_masks(folder)
    with pytest.raises(DataError, match="There is no folder"):
        read_masks(tmp_path / "none")
    with pytest.raises(ConfigError, match="No mask shows 'spleen'"):
        read_masks(drawn, ("spleen",))
    with pytest.raises(ConfigError, match="no mode"):
        SegmentOptions(mode="half")


def test_by_the_command(model: Path, drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["finetune", "segment", "--checkpoint", str(model), "--data", str(drawn), "--epochs", "1"]
    assert main([*common, "--out", str(tmp_path / "out"), "--structures", "right lung"]) == 0
    out = capsys.readouterr().out
    assert "dice_right_lung" in out
    assert "patients dealt by seed 0" in " ".join(out.split())
    assert main([*common, "--out", str(tmp_path / "other"), "--structures", "spleen"]) == 1
    assert "No mask shows 'spleen'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_gains_are_differences_of_means_whatever_is_known() -> None:
    difference = np.array([[0.2, 0.5], [0.4, 0.7], [-0.3, 9.0], [0.1, 9.0]])
    labels = np.array([[1, 1], [1, 0], [1, UNKNOWN], [1, UNKNOWN]], np.int8)
    points, drawn = _gains(
        difference,
        labels,
        ["a", "b", "c", "d"],
        (
            "One",
            "Two",
        ),
        seed=0,
    )
    assert points == pytest.approx({"dice_gain_mean": (0.1 + 0.6) / 2, "dice_gain_one": 0.1, "dice_gain_two": 0.6})
    low, high = drawn["dice_gain_one"] or (0, 0)
    assert -0.3 < low < 0.1 < high < 0.4
