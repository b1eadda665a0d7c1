"""The mirror test: what agrees, what only seems to, and the whole way on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluation_place import Place, make_place

from ssacl.anatomy import FINDING_INDEX, FINDINGS, NODE_INDEX, NODES, mirrored
from ssacl.atlas import CHART
from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.drawing import drawn_centroids
from ssacl.evaluation import mirror
from ssacl.evaluation.mirror import mirror_scores
from ssacl.evaluation.predictions import sample_digest
from ssacl.evaluation.truth import load_truth, one_sided

EFFUSION = FINDING_INDEX["Pleural Effusion"]
TWIN = [NODE_INDEX[mirrored(node)] for node in NODES]


def _answer(side: str, centroids: np.ndarray | None = None) -> mirror._Answer:
    present = np.zeros(len(FINDINGS), dtype=bool)
    present[EFFUSION] = True
    sides = np.zeros(len(FINDINGS))
    sides[EFFUSION] = 0.8 if side == "right" else -0.8
    places = np.array(drawn_centroids()) if centroids is None else centroids
    return mirror._Answer(places, present, present * 0.9, sides, {"Pleural Effusion": side})


def _turned(answer: mirror._Answer, side: str) -> mirror._Answer:
    return _answer(side, answer.centroids[TWIN] * (-1, 1))


def _all(pairs: list[tuple[mirror._Answer, mirror._Answer]]) -> tuple[dict, dict, dict]:
    rng = np.random.default_rng(0)
    return mirror._maps(pairs, rng), mirror._findings(pairs, rng), mirror._text(pairs, rng)


def test_a_model_that_sees_the_mirror_agrees_with_itself() -> None:
    pairs = [(answer := _answer("right"), _turned(answer, "left")) for _ in range(8)]
    maps, findings, text = _all(pairs)
    for part in (maps, findings, text):
        assert part["agreement"]["value"] == 1.0
        assert part["agreement"]["interval"] == [1.0, 1.0]
    assert findings["side"]["agreement"] == {"value": 1.0, "num": 8, "interval": [1.0, 1.0]}
    assert maps["on_their_side"] == {"plain": 1.0, "mirrored": 1.0}
    assert (text["coverage"], text["statement_f1"]) == (1.0, 1.0)


def test_a_model_that_ignores_the_picture_does_not() -> None:
    # Its maps are in their usual place on both films, which the symmetric atlas makes look right: the words betray it.
    pairs = [(_answer("right"), _answer("right")) for _ in range(4)]
    _, findings, text = _all(pairs)
    assert findings["agreement"]["value"] == 1.0
    assert findings["side"]["agreement"]["value"] == 0.0
    assert (text["agreement"]["value"], text["statement_f1"], text["coverage"]) == (0.0, 0.0, 1.0)


def test_maps_that_do_not_move_with_a_shifted_patient_disagree() -> None:
    shifted = np.array(drawn_centroids()) + np.array([0.3, 0.0])
    maps, _, _ = _all([(_answer("right", shifted), _answer("left", shifted))])
    assert maps["agreement"]["value"] < 0.05
    swapped = np.array(drawn_centroids()) * (-1, 1)
    maps, _, _ = _all([(_answer("right", swapped), _turned(_answer("right", swapped), "left"))])
    assert maps["agreement"]["value"] == 1.0, "agreement is blind to sides that are wrong on both films"
    assert maps["on_their_side"]["plain"] == 0.0
    assert len(CHART) == 25


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("mirror"))


def test_a_checkpoint_is_measured_from_end_to_end(place: Place) -> None:
    done: list[int] = []
    scores = mirror_scores(place.model, place.data, "test", place.truth, limit=4, progress=done.append)
    assert sum(done) == scores["num_films"] == 4
    assert scores["maps"]["agreement"]["num"] == 4 * len(NODES)
    assert scores["findings"]["agreement"]["num"] == 4 * 13
    assert 0 <= scores["maps"]["agreement"]["value"] <= 1
    assert set(scores["findings"]["side"]) == {"agreement", "right_side_plain", "right_side_mirrored"}
    again = mirror_scores(place.model, place.data, "test", place.truth, limit=4)
    assert again == scores


def test_true_sides_are_those_of_the_truth(place: Place) -> None:
    truth, storage = load_truth(place.truth), open_storage(str(place.data))
    seen = set()
    for entry in open_split(storage, "train", purpose="evaluation"):
        digest = sample_digest(read_sample(storage, entry))
        sides = one_sided(truth, digest)
        named = {(finding.name, finding.side) for finding in truth[digest].findings}
        assert set(sides.items()) <= named
        assert all((name, {"right": "left", "left": "right"}[side]) not in named for name, side in sides.items())
        seen |= set(sides.values())
    assert seen == {"right", "left"}


def test_a_limit_of_nothing_is_named(place: Place, tmp_path: Path) -> None:
    from ssacl.errors import DataError

    with pytest.raises(DataError, match="limit of 0"):
        mirror_scores(place.model, place.data, "test", limit=0)
