"""Phrase scores: contrast by hand, a perfect and a blind model, and the whole way on a tiny one."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_place import Place, make_place

from ssacl.errors import DataError
from ssacl.evaluation import phrases
from ssacl.evaluation.phrases import WORDS, contrast, phrase_scores
from ssacl.inference.grounding import understand


def test_contrast_by_hand() -> None:
    image = np.array([[4, 2], [0, 0]], dtype=np.float32)
    mask = np.array([[True, True], [False, False]])
    assert contrast(image, mask) == pytest.approx((3 - 0) / 1.0)
    assert contrast(image, ~mask) == pytest.approx(-3.0)


@pytest.mark.parametrize("finding", WORDS)
def test_the_words_of_every_finding_are_understood_with_their_side(finding: str) -> None:
    right, left = (understand(f"{side} {WORDS[finding]}") for side in ("right", "left"))
    assert right.finding == left.finding == finding
    assert right.anatomy
    assert all(node.startswith("right ") for node in right.anatomy)
    assert all(node.startswith("left ") for node in left.anatomy)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("phrases"), 80)


def test_a_checkpoint_is_measured_from_end_to_end(place: Place) -> None:
    scores = phrase_scores(place.model, place.data, place.truth)
    assert set(scores["maps"]) == {"phrase", "anatomy", "average"}
    assert scores["num_phrases"] == sum(row["num"] for row in scores["by_finding"].values()) == scores["opposite"]["num"]
    for row in scores["maps"].values():
        assert 0 <= row["pointing"] <= 1
        assert 0 <= row["iou"] <= 1
    assert 0 <= scores["confidence"]["auc"] <= 1
    assert scores["maps"]["average"]["cnr"] > 0, "the average of the true masks lies where findings are"


def test_a_model_that_sees_the_truth_scores_at_the_top(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true masks stand for the model's maps, and presence for its confidence."""
    ask = phrases._ask_one

    def knowing(asked: phrases._Asked, *rest: object) -> None:
        before, told = len(asked.names), len(asked.confidence)
        ask(asked, *rest)  # type: ignore[arg-type]
        for index in range(before, len(asked.names)):
            mask = asked.masks[index].astype(np.float32)
            asked.maps["phrase"][index], asked.opposite[index] = mask, mask[:, ::-1].copy()
        asked.confidence[told:] = [(finding, there, float(there)) for finding, there, _ in asked.confidence[told:]]

    monkeypatch.setattr(phrases, "_ask_one", knowing)
    scores = phrase_scores(place.model, place.data, place.truth)
    assert scores["maps"]["phrase"]["pointing"] == 1.0
    assert scores["maps"]["phrase"]["iou"] > 0.9
    assert scores["confidence"]["auc"] == 1.0
    assert scores["opposite"]["mean_correlation"] < 0.2


def test_thresholds_are_not_chosen_on_what_is_measured(place: Place) -> None:
    with pytest.raises(DataError, match="chosen on val"):
        phrase_scores(place.model, place.data, place.truth, split="val")
