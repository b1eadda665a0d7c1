"""`ssacl finetune classify`: areas against scikit-learn, probes that learn what can be seen, runs that go on, and the card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from downstream_trees import write_nih, write_rsna
from sklearn.metrics import roc_auc_score
from tiny_model import tiny_model_folder
from training_set import write_training_set

from ssacl.cli import main
from ssacl.data.records import Sample
from ssacl.data.shards import ShardIndex, ShardWriter
from ssacl.data.storage import open_storage
from ssacl.errors import ConfigError, DataError, SSACLError, TrainingError
from ssacl.evaluation.downstream import epochs, features
from ssacl.evaluation.downstream.areas import area_figures, patient_weights, resampled_areas
from ssacl.evaluation.downstream.classify import ClassifyOptions, classify
from ssacl.evaluation.downstream.epochs import Schedule
from ssacl.evaluation.downstream.films import UNKNOWN
from ssacl.evaluation.downstream.label_layouts import LabelOptions
from ssacl.evaluation.downstream.probe import fit_probe
from ssacl.evaluation.scorecard import read_card

EFFUSION = LabelOptions(findings=("Effusion",))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def nih(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nih(tmp_path_factory.mktemp("classify") / "nih")


def test_weighted_areas_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 12, 200) / 7, rng.random(200) < 0.3
    weights = patient_weights([str(number // 2) for number in range(200)], seed=1, num_resamples=60)
    expected = [roc_auc_score(truth, scores, sample_weight=row) for row in weights]
    assert np.abs(resampled_areas(scores, truth, weights) - expected).max() < 1e-6
    assert (weights[:, ::2] == weights[:, 1::2]).all(), "the films of a patient are drawn together"
    assert (weights.sum(1) == 200).all()
    assert np.isnan(resampled_areas(scores, np.zeros(200, bool), weights)).all()


def test_figures_leave_unknown_labels_out_and_pair_the_difference() -> None:
    rng = np.random.default_rng(2)
    labels = (rng.random((80, 2)) < 0.4).astype(np.int8)
    good, bad = labels + rng.normal(0, 0.4, labels.shape), rng.random(labels.shape)
    labels[:30, 0] = UNKNOWN
    patients = [str(number) for number in range(80)]
    points, drawn = area_figures({"model": good, "raw_pixels": bad}, labels, ("A b", "C"), patients, seed=0)
    expected = [roc_auc_score(labels[30:, 0], good[30:, 0]), roc_auc_score(labels[:, 1], good[:, 1])]
    assert points["model"] == pytest.approx({"auc_a_b": expected[0], "auc_c": expected[1], "auc_mean": np.mean(expected)}, abs=1e-6)
    assert points["difference"]["auc_mean"] == pytest.approx(np.mean(expected) - (points["raw_pixels"]["auc_mean"] or 0))
    low, high = drawn["difference"]["auc_mean"] or (0, 0)
    assert 0 < low < (points["difference"]["auc_mean"] or 0) < high
    alone, _ = area_figures({"model": good}, np.zeros_like(labels), ("a", "b"), patients, seed=0)
    assert alone == {"model": {"auc_a": None, "auc_b": None, "auc_mean": None}}


def test_a_probe_finds_what_is_there_and_chooses_on_validation_alone() -> None:
    rng = np.random.default_rng(3)
    labels = (rng.random((90, 2)) < 0.5).astype(np.int8)
    seen = rng.normal(size=(90, 20)).astype(np.float32)
    seen[:, 0] += 3 * labels[:, 0]
    labels[:40, 1] = 1
    train, val, test = (slice(0, 40), slice(40, 60), slice(60, 90))
    probe = fit_probe((seen[train], labels[train]), (seen[val], labels[val]), seen[test], ("seen", "constant"))
    assert roc_auc_score(labels[test, 0], probe.test[:, 0]) > 0.8
    assert probe.chosen["constant"] is None, "no absent film to learn from"
    assert not probe.test[:, 1].any()
    again = fit_probe((seen[train], labels[train]), (seen[val], labels[val]), seen[test][::-1], ("seen", "constant"))
    assert again.chosen == probe.chosen
    assert np.allclose(again.test, probe.test[::-1])
    seen[0, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        fit_probe((seen[train], labels[train]), (seen[val], labels[val]), seen[test], ("seen", "constant"))


def test_linear_over_label_shares(model: Path, nih: Path, tmp_path: Path) -> None:
    counted: list[int] = []
    card = classify(model, nih, tmp_path, EFFUSION, ClassifyOptions(percents=(10, 100)), start=counted.append, progress=counted.append)
    assert counted[0] == sum(counted[1:]) == 80
    assert card == read_card(tmp_path)
    by_percent = card["details"]["by_percent_of_labels"]
    assert (by_percent["10"]["train_films"], by_percent["100"]["train_films"]) == (8, 54)
    systems = by_percent["100"]["systems"]
    assert systems["raw_pixels"]["figures"]["auc_effusion"] > 0.95, "a white patch is easily seen in pixels"
    assert card["metrics"]["auc_effusion_100"] > 0.8
    low, high = card["intervals"]["auc_effusion_100"]
    assert low <= card["metrics"]["auc_effusion_100"] <= high
    gain = card["metrics"]["auc_effusion_100"] - systems["raw_pixels"]["figures"]["auc_effusion"]
    assert card["metrics"]["auc_gain_effusion_100"] == pytest.approx(gain)
    assert card["rows"][0]["baseline"] == systems["raw_pixels"]["figures"]["auc_effusion"]
    assert card["data"]["films"] == {"train": 54, "val": 6, "test": 20}
    told = (tmp_path / "scorecard.json").read_text() + (tmp_path / "scorecard.html").read_text() + (tmp_path / "run.json").read_text()
    assert "00000004" not in told, "neither films nor patients are named"
    assert not card["training_films"]["checked"]


def test_an_interrupted_run_goes_on_to_the_same_card(model: Path, nih: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PART", 8)
    whole = classify(model, nih, tmp_path / "whole", EFFUSION)

    def stop(count: int) -> None:
        read.append(count)
        if sum(read) >= 32:
            raise KeyboardInterrupt

    read: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        classify(model, nih, tmp_path / "cut", EFFUSION, progress=stop)
    kept = sorted((tmp_path / "cut" / "kept").glob("*.npz"))
    assert len(kept) == 4
    assert not (tmp_path / "cut" / "scorecard.json").exists()
    times = [path.stat().st_mtime_ns for path in kept]
    kept[0].write_bytes(b"damaged")
    assert classify(model, nih, tmp_path / "cut", EFFUSION) == whole
    assert [path.stat().st_mtime_ns for path in kept][1:] == times[1:]
    with pytest.raises(DataError, match="holds another evaluation"):
        classify(model, nih, tmp_path / "cut", EFFUSION, ClassifyOptions(seed=1))


def test_the_encoder_is_trained_chosen_on_validation_and_goes_on(
    model: Path, nih: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ClassifyOptions(mode="full", schedule=Schedule(num_epochs=3, batch_size=16, lr=1e-3, head_lr=1e-2))
    whole = classify(model, nih, tmp_path / "whole", EFFUSION, options)
    chosen = whole["details"]["by_percent_of_labels"]["100"]["chosen_on_val"]["model"]
    figures = chosen["val_auc_by_epoch"]
    assert len(figures) == 3
    assert chosen["best_epoch"] == 1 + int(np.argmax(figures))
    assert whole["metrics"]["auc_effusion_100"] > 0.85
    write, written = epochs.write_whole, []

    def stop_after_two(path: Path, content: bytes) -> None:
        write(path, content)
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(epochs, "write_whole", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        classify(model, nih, tmp_path / "cut", EFFUSION, options)
    monkeypatch.setattr(epochs, "write_whole", write)
    again = classify(model, nih, tmp_path / "cut", EFFUSION, options)
    assert again["metrics"] == whole["metrics"]
    assert again["details"] == whole["details"]
    written[0].write_bytes(b"damaged")
    with pytest.raises(TrainingError, match="is damaged; delete it"):
        classify(model, nih, tmp_path / "cut", EFFUSION, options)


def test_rsna_and_ingested_sets_by_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rsna = write_rsna(tmp_path / "rsna")
    common = ["finetune", "classify", "--checkpoint", str(model)]
    assert main([*common, "--data", str(rsna), "--out", str(tmp_path / "a"), "--labels", "50,100"]) == 0
    assert "raw pixels" in capsys.readouterr().out
    assert {"auc_pneumonia_50", "auc_pneumonia_100"} <= read_card(tmp_path / "a")["metrics"].keys()
    data = write_training_set(tmp_path / "set")
    chosen = ["--findings", "Pleural Effusion", "--only", "Pleural Effusion,No Finding"]
    assert main([*common, "--data", str(data), "--out", str(tmp_path / "b"), *chosen]) == 0
    card = read_card(tmp_path / "b")
    assert card["data"]["only"] == ["Pleural Effusion", "No Finding"]
    assert card["details"]["present_in_test"] == {"Pleural Effusion": 2}


def test_films_of_the_training_split_are_refused_left_out_or_marked(model: Path, nih: Path, tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "set"))
    writer = ShardWriter(storage, "train")
    for name in ("00000004_000.png", "00000020_001.png", "00000001_000.png"):
        content = next(nih.rglob(name)).read_bytes()
        writer.add(Sample(name[:12], content, "png", provenance={"content_sha256": hashlib.sha256(content).hexdigest()}))
    ShardIndex((writer.close(),)).save(storage)

    def run(policy: str) -> dict[str, Any]:
        options = ClassifyOptions(trained_on=storage.url, trained_films=policy)
        return classify(model, nih, tmp_path / policy, EFFUSION, options)

    with pytest.raises(DataError, match="2 of 20 annotated films are in the checkpoint's training split"):
        run("refuse")
    left, marked = run("leave-out"), run("mark")
    assert (left["data"]["num_cases"], marked["data"]["num_cases"]) == (18, 20)
    assert left["training_films"]["num"] == marked["training_films"]["num"] == 2
    assert left["training_films"]["checked"]
    with pytest.raises(ConfigError, match="no policy"):
        run("ignore")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "ten"], "no list of percentages"),
        (["--labels", "0"], "no share of labels"),
        (["--findings", "Gout"], "'Gout' is no finding"),
        (["--epochs", "0"], "one epoch"),
        (["--device", "abacus"], "cannot use the device 'abacus'"),
    ],
)
def test_wrong_options_are_one_line(
    model: Path, nih: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = ["finetune", "classify", "--checkpoint", str(model), "--data", str(nih), "--out", str(tmp_path / "out"), *arguments]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_card_is_plain_json_and_errors_are_the_projects_own(model: Path, nih: Path, tmp_path: Path) -> None:
    with pytest.raises(SSACLError):
        classify(model, tmp_path, tmp_path / "out")
    card = classify(model, nih, tmp_path / "out", LabelOptions())
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert card["metrics"]["auc_hernia_100"] is None, "no film has it"
    assert card["metrics"]["auc_mean_100"] is not None
