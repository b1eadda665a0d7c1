"""Evaluation of a checkpoint on phantom studies that went through ingest: joins, baselines, what may be read, and the score card."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chexbert_files import published, write_chexbert
from evaluation_place import Place, make_place
from rich.console import Console

from ray_jobs.evaluate import run_evaluation
from ssacl.anatomy import FINDING_INDEX, FINDINGS, NODE_INDEX, FindingStatus
from ssacl.data.loader import open_split
from ssacl.data.shards import ShardIndex
from ssacl.data.storage import open_storage
from ssacl.errors import CheckpointError, DataError, SplitError
from ssacl.evaluation.predictions import Predictions, SplitPredictor, Work
from ssacl.evaluation.scorecard import make_card, print_card, read_card, summary_rows, write_card
from ssacl.evaluation.study_set import SplitEvaluation, evaluate_split, num_cases_to_answer
from ssacl.evaluation.truth import load_truth, square_masks, true_masks, true_status
from ssacl.inference.generator import GenerationOptions
from ssacl.phantom import write_dicom_tree

FAST = GenerationOptions(num_beams=1, max_new_tokens=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("evaluation"))


class PerfectRunner:
    """Answers with the truth: what every score is at its best. Stands for a checkpoint that knows everything."""

    def __init__(self, place: Place) -> None:
        self._inner = SplitPredictor(str(place.model), str(place.data))
        self._truth = load_truth(place.truth)
        self.asked: list[Work] = []

    def describe(self) -> dict[str, Any]:
        return self._inner.describe()

    def run(self, work: Sequence[Work]) -> Iterator[Predictions]:
        # Last first: the order of answers must not matter.
        for each in reversed(work):
            self.asked.append(each)
            answer = self._inner.predict(each)
            status = true_status(self._truth, answer.digests)
            masks = true_masks(self._truth, answer.digests, side_px=56).astype(np.float32)
            yield dataclasses.replace(
                answer, reports=answer.references, probabilities=(status == FindingStatus.PRESENT).astype(float), maps=masks
            )


@pytest.fixture(scope="module")
def evaluation(place: Place) -> SplitEvaluation:
    return evaluate_split(place.model, place.data, "test", place.truth, options=FAST)


@pytest.fixture(scope="module")
def perfect(place: Place) -> tuple[SplitEvaluation, PerfectRunner]:
    runner = PerfectRunner(place)
    return evaluate_split(place.model, place.data, "test", place.truth, options=FAST, runner=runner), runner


def test_every_case_of_the_split_is_answered_once_and_in_order(place: Place, evaluation: SplitEvaluation) -> None:
    entries = open_split(open_storage(str(place.data)), "test", "evaluation")
    assert evaluation.predictions.keys == tuple(entry.key for entry in entries)
    assert evaluation.identity["data"] == {
        "sha256": ShardIndex.load(open_storage(str(place.data))).digest,
        "split": "test",
        "num_cases": len(entries),
        "limit": None,
    }
    assert evaluation.predictions.maps.shape == (len(entries), 32, 16, 16), "twice as fine as the patches"


def test_scores_stand_beside_their_baselines(evaluation: SplitEvaluation) -> None:
    metrics = evaluation.metrics
    assert list(metrics["findings"]) == ["head", "prior_all", "prior_frequent"]
    reports = ["model", "majority", "normal_medoid", "random_report"]
    assert list(metrics["reports"]["text"]) == reports
    assert {what: list(each) for what, each in metrics["reports"]["findings_against"].items()} == {
        "reference_reports": reports,
        "truth": reports,
    }
    assert list(metrics["maps"]) == ["model", "average_mask", "centre", "random"]
    json.dumps(metrics, allow_nan=False)


def test_a_checkpoint_that_knows_everything_scores_full_marks(perfect: tuple[SplitEvaluation, PerfectRunner]) -> None:
    evaluation, _ = perfect
    figures = {row["figure"]: row["model"] for row in summary_rows(evaluation.metrics)}
    assert figures["findings_f1_micro_14"] == 1.0
    for score in ("bleu_1", "bleu_4", "rouge_l"):
        assert figures[score] == pytest.approx(1.0, abs=1e-6)
    assert evaluation.metrics["reports"]["findings_against"]["reference_reports"]["model"]["f1_micro_14"] == 1.0
    assert figures["right_lung_pointing"] == figures["left_lung_pointing"] == 1.0
    assert figures["right_lung_iou"] > 0.9
    effusion = evaluation.metrics["effusion"]["head"]
    assert (effusion["mean_with"], effusion["mean_without"]) == (1.0, 0.0)
    for row in summary_rows(evaluation.metrics):
        if row["baseline"] is not None and row["figure"] != "findings_f1_macro_14":
            assert row["model"] >= row["baseline"], row


def test_right_is_right(place: Place) -> None:
    class Mirrored(PerfectRunner):
        def run(self, work: Sequence[Work]) -> Iterator[Predictions]:
            for answer in super().run(work):
                yield dataclasses.replace(answer, maps=answer.maps[..., ::-1].copy())

    mirrored = evaluate_split(place.model, place.data, "test", place.truth, options=FAST, runner=Mirrored(place))
    nodes = mirrored.metrics["maps"]["model"]["nodes"]
    assert nodes["right lung"]["pointing"] < 0.5 > nodes["left lung"]["pointing"]


def test_validation_answers_are_for_maps_only(perfect: tuple[SplitEvaluation, PerfectRunner], place: Place) -> None:
    _, runner = perfect
    by_split = {work.entries[0].split: work.options for work in runner.asked}
    assert set(by_split) == {"test", "val"}
    assert by_split["val"].max_new_tokens == 1
    assert by_split["test"].max_new_tokens == FAST.max_new_tokens
    assert num_cases_to_answer(place.data, "test", None, True) == sum(len(work.entries) for work in runner.asked)


def test_without_truth_labels_are_the_measure(place: Place) -> None:
    evaluation = evaluate_split(place.model, place.data, "test", limit=3, options=FAST)
    assert evaluation.identity["findings_against"] == "labels"
    assert evaluation.identity["data"]["num_cases"] == 3
    assert "maps" not in evaluation.metrics
    assert list(evaluation.metrics["reports"]["findings_against"]) == ["reference_reports"]
    assert num_cases_to_answer(place.data, "test", 3, False) == 3


def test_truth_of_other_films_is_refused(place: Place, tmp_path: Path) -> None:
    write_dicom_tree(tmp_path / "others", 12, seed=9, size_px=64, num_processes=1)
    with pytest.raises(DataError, match="have no truth there"):
        evaluate_split(place.model, place.data, "test", tmp_path / "others_truth", options=FAST)
    with pytest.raises(DataError, match="no complete phantom truth"):
        evaluate_split(place.model, place.data, "test", tmp_path / "nothing_truth", options=FAST)


def test_a_damaged_sample_stops_the_evaluation(place: Place, tmp_path: Path) -> None:
    data = shutil.copytree(place.data, tmp_path / "data")
    entry = open_split(open_storage(str(data)), "test", "evaluation")[1]
    content = bytearray((data / entry.shard).read_bytes())
    content[entry.image_offset + 30] ^= 0xFF
    (data / entry.shard).write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        evaluate_split(place.model, data, "test", options=FAST)


def test_splits_and_limits_that_make_no_sense(place: Place) -> None:
    with pytest.raises(SplitError, match="no split"):
        evaluate_split(place.model, place.data, "films_truth")
    with pytest.raises(DataError, match="limit of 0"):
        evaluate_split(place.model, place.data, "test", limit=0)
    with pytest.raises(DataError, match="No validation case is left"):
        evaluate_split(place.model, place.data, "val", place.truth)


def test_true_status_is_what_was_drawn(place: Place) -> None:
    truth = load_truth(place.truth)
    digests = list(truth)
    status = true_status(truth, digests)
    assert set(np.unique(status)) == {FindingStatus.ABSENT, FindingStatus.PRESENT}
    for row, digest in zip(status, digests, strict=True):
        drawn = {finding.name for finding in truth[digest].findings}
        stated = {name for name in FINDINGS if row[FINDING_INDEX[name]] == FindingStatus.PRESENT}
        assert stated - {"No Finding"} == drawn - {"No Finding"}
        assert ("No Finding" in stated) == (not drawn - {"Support Devices", "No Finding"})


def test_masks_go_through_the_models_fit() -> None:
    wide = np.zeros((1, 50, 100), dtype=bool)
    wide[0, :, :25] = True
    square = square_masks(wide, 224)
    assert square[0, 56:168, :56].all(), "the picture's left quarter"
    assert not square[0, :, 56:].any()
    assert not square[0, :56].any(), "padding"
    assert not square[0, 168:].any()
    assert np.array_equal(square_masks(square, 224), square)


def test_right_lung_lies_on_the_pictures_left(place: Place) -> None:
    truth = load_truth(place.truth)
    masks = true_masks(truth, list(truth)[:10])
    columns = np.arange(masks.shape[-1])
    right, left = (
        (masks[:, NODE_INDEX[node]].sum(axis=1) * columns).sum(-1) / masks[:, NODE_INDEX[node]].sum((1, 2))
        for node in ("right lung", "left lung")
    )
    assert (right < left).all()


def test_card_states_what_scores_depend_on_and_comes_back(evaluation: SplitEvaluation, tmp_path: Path) -> None:
    card = make_card(evaluation)
    path = write_card(card, tmp_path / "scores")
    assert path.name == "scorecard.json"
    assert read_card(path) == read_card(tmp_path / "scores") == json.loads(json.dumps(card))
    assert [entry.name for entry in (tmp_path / "scores").iterdir()] == ["scorecard.json"]
    assert {
        "data",
        "checkpoint",
        "uncertain",
        "labeler",
        "tokenisation",
        "truncation",
        "sections",
        "thresholds",
        "versions",
        "generation",
    } <= set(card)
    assert card["truncation"] == "none"
    assert {"bleu_1", "bleu_4", "rouge_l", "cider_d", "clinical_f1_micro_14", "right_lung_pointing"} <= set(card["metrics"])
    stream = io.StringIO()
    print_card(card, Console(file=stream, width=120))
    for word in ("best baseline", "clinical_f1_micro_14", "uncertain counts as present", card["checkpoint"]["model_version"]):
        assert word in stream.getvalue()


def test_chexbert_may_read_the_reports_too(place: Place, perfect: tuple[SplitEvaluation, PerfectRunner], tmp_path: Path) -> None:
    folder = write_chexbert(tmp_path, published())
    card = make_card(evaluate_split(place.model, place.data, "test", place.truth, options=FAST, runner=perfect[1], chexbert_folder=folder))
    assert (card["labeler"], card["chexbert"][:9]) == ("ssacl.data.labeler", "CheXbert ")
    assert make_card(perfect[0])["chexbert"] is None
    # The same reports on both sides agree whoever reads them; against the truth, random weights cannot be right.
    found = {what: each["model"]["f1_micro_14"] for what, each in card["details"]["reports"]["findings_against"].items()}
    assert found["reference_reports"] == found["reference_reports_by_chexbert"] == card["metrics"]["chexbert_f1_micro_14"] == 1
    assert found["truth_by_chexbert"] < found["truth"]
    with pytest.raises(CheckpointError, match="CheXbert needs one of each"):
        evaluate_split(place.model, place.data, chexbert_folder=tmp_path / "nowhere")


def test_cards_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable score card"):
        read_card(tmp_path)
    (tmp_path / "scorecard.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 2"):
        read_card(tmp_path)


def test_best_baseline_is_named() -> None:
    scores = {
        name: {f"f1_{mean}_{group}": value for mean in ("micro", "macro") for group in ("14", "13", "5")}
        for name, value in {"head": 0.4, "prior_all": 0.2, "prior_frequent": 0.3}.items()
    }
    rows = summary_rows({"findings": scores})
    assert rows[0] == {"figure": "findings_f1_micro_14", "model": 0.4, "baseline": 0.3, "baseline_name": "prior_frequent"}


@pytest.mark.ray
@pytest.mark.slow
def test_on_actors_the_same(place: Place, tmp_path: Path) -> None:
    alone = run_evaluation(place.model, place.data, truth_folder=place.truth, out_folder=tmp_path, options=FAST)
    together = run_evaluation(place.model, place.data, truth_folder=place.truth, num_workers=2, options=FAST)
    assert together["metrics"] == alone["metrics"]
    assert read_card(tmp_path)["metrics"] == alone["metrics"]
    with pytest.raises(CheckpointError, match="--num-workers 1"):
        run_evaluation(tmp_path / "no-model", place.data, num_workers=2, options=FAST)
