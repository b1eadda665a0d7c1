"""A checkpoint's evaluation as a user runs it: files, evidence, resuming, and what must not be possible."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from chexbert_files import published, write_chexbert
from evaluation_place import Place, make_place

from ray_jobs import evaluate as job
from ssacl.data.loader import open_split
from ssacl.data.reports import training_text
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.errors import DataError, SplitError
from ssacl.evaluation import predictions
from ssacl.evaluation.compare import compare
from ssacl.evaluation.pairs_evaluation import evaluate_pairs
from ssacl.evaluation.predictions import Predictions, SplitPredictor, Work
from ssacl.evaluation.scorecard import read_card
from ssacl.inference.generator import GenerationOptions

FAST = GenerationOptions(num_beams=1, max_new_tokens=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def evaluated(place: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("scores")
    return out, job.run_evaluation(place.model, place.data, truth_folder=place.truth, out_folder=out, options=FAST)


def test_what_a_user_gets(place: Place, evaluated: tuple[Path, dict[str, Any]]) -> None:
    out, card = evaluated
    assert read_card(out) == json.loads(json.dumps(card))
    names = {"bleu_1", "bleu_4", "rouge_l", "cider_d", "clinical_f1_micro_14", "clinical_f1_example_14", "findings_f1_micro_14"}
    assert names | {"true_findings_f1_micro_13", "right_lung_pointing", "prior_share"} <= set(card["metrics"])
    assert set(card["config"]) >= {"model", "losses", "data"}
    assert "url" not in card["config"]["data"], "where data lie is nobody's business"
    page = (out / "scorecard.html").read_text()
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == sum(len(card["shown"][kind]) for kind in ("best", "median", "worst"))
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert card["checkpoint"]["model_version"] in page


def test_the_two_forms_agree(place: Place, evaluated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, card = evaluated
    again = evaluate_pairs(out / "pairs.jsonl", tmp_path / "pairs", data_url=str(place.data), uncertain=card["uncertain"])
    assert again["metrics"] == pytest.approx({name: card["metrics"][name] for name in again["metrics"]}, abs=1e-6)
    assert again["data"]["references_sha256"] == card["data"]["references_sha256"]
    assert again["data"]["data_set_sha256"] == card["data"]["sha256"]
    rows = compare(out, tmp_path / "pairs", tmp_path / "both")["figures"].values()
    assert {row["difference"] for row in rows} <= {0.0, None}


def test_drafts_made_already_are_not_made_again(
    place: Place, evaluated: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssacl.evaluation.study_set.CHUNK", 2)
    made: list[str] = []
    predict = SplitPredictor.predict

    def until_stopped(self: SplitPredictor, work: Work) -> Predictions:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(work.entries[0].key)
        return predict(self, work)

    def run() -> dict[str, Any]:
        return job.run_evaluation(place.model, place.data, out_folder=tmp_path / "out", limit=6, options=FAST)

    monkeypatch.setattr(SplitPredictor, "predict", until_stopped)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "out" / "scorecard.json").exists()
    made.append("and one more may be made")
    card = run()
    keys = [entry.key for entry in open_split(open_storage(str(place.data)), "test", "evaluation")[:6]]
    assert [made[0], made[1], made[3]] == keys[::2]
    assert card["metrics"].keys() - {"distinct_share"} <= set(evaluated[1]["metrics"])
    with pytest.raises(DataError, match="another evaluation"):
        job.run_evaluation(place.model, place.data, out_folder=tmp_path / "out", limit=4, options=FAST)
    # CheXbert reads drafts that are there.
    monkeypatch.setattr(SplitPredictor, "predict", None)
    chexbert = write_chexbert(tmp_path, published())
    more = job.run_evaluation(place.model, place.data, out_folder=tmp_path / "out", limit=6, options=FAST, chexbert_folder=chexbert)
    assert "chexbert_f1_micro_14" in more["metrics"]
    assert more["metrics"]["bleu_4"] == card["metrics"]["bleu_4"]


def test_pairs_of_another_split_are_refused_with_counts(place: Place, tmp_path: Path) -> None:
    storage = open_storage(str(place.data))
    keys = {split: [entry.key for entry in open_split(storage, split, "evaluation")] for split in ("test", "val", "train")}
    lines = [*keys["test"][:-1], keys["val"][0], keys["train"][0], keys["train"][1], "unknown"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"id": key, "prediction": "a", "reference": "b"}) + "\n" for key in lines))
    with pytest.raises(SplitError, match=rf"4 of {len(lines)} ids .*'test' \(1 of no split, 2 of 'train', 1 of 'val'\)") as raised:
        evaluate_pairs(path, tmp_path / "out", data_url=str(place.data))
    assert f"1 of {len(keys['test'])} studies of 'test' have no pair" in str(raised.value)
    assert not (tmp_path / "out").exists()


def answers_without_the_report(predictor: SplitPredictor, work: Work, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Does the predictor draft the same when the samples' reports and labels are others?"""
    honest = predictor.predict(work)
    read = predictions.read_sample
    with monkeypatch.context() as patch:
        patch.setattr(
            predictions,
            "read_sample",
            lambda *where: dataclasses.replace(read(*where), findings="Another.", impression="", labels=(1,) * 14),
        )
        other = predictor.predict(work)
    assert other.references != honest.references, "the reports were exchanged"
    return other.reports == honest.reports


def test_a_report_leaked_into_the_prompt_is_caught(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(place.data))
    work = Work(tuple(open_split(storage, "test", "evaluation")[:2]), FAST)
    assert answers_without_the_report(SplitPredictor(str(place.model), str(place.data)), work, monkeypatch)

    class Leaking(SplitPredictor):
        def predict(self, work: Work) -> Predictions:
            answer = super().predict(work)
            leaked = [training_text(predictions.read_sample(storage, entry)).split()[0] for entry in work.entries]
            return dataclasses.replace(answer, reports=tuple(f"{word} {text}" for word, text in zip(leaked, answer.reports, strict=True)))

    assert not answers_without_the_report(Leaking(str(place.model), str(place.data)), work, monkeypatch)
    assert training_text(read_sample(storage, work.entries[0])) != "Another."


def test_nothing_is_selected_on_the_test_split(
    place: Place, evaluated: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an evaluation chooses by itself (map thresholds, priors) comes from train and val, whatever the test split holds."""
    for purpose in ("training", "validation"):
        with pytest.raises(SplitError, match="must not read the test split"):
            open_split(open_storage(str(place.data)), "test", purpose)  # type: ignore[arg-type]
    asked: list[tuple[str, int]] = []

    class Watched(SplitPredictor):
        def run(self, work: Sequence[Work]) -> Iterator[Predictions]:
            asked.extend((each.entries[0].split, each.options.max_new_tokens) for each in work)
            return super().run(work)

    monkeypatch.setattr(job, "SplitPredictor", Watched)
    job.run_evaluation(place.model, place.data, truth_folder=place.truth, limit=2, options=FAST)
    assert {split for split, tokens in asked if tokens == 1} == {"val"}, "thresholds of maps"
    assert {split for split, tokens in asked if tokens != 1} == {"test"}
