"""Phrases on a film: the place that they name, opposite sides, and how sure the model is; maps laid by the leaves' attention."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import encoded_film, tiny_model_folder

from ssacl.anatomy import FINDING_INDEX, LEAVES, NODE_INDEX, NODES, leaves_below
from ssacl.atlas import CHART
from ssacl.data.dicom import Picture, read_picture
from ssacl.errors import GenerationError
from ssacl.inference.generator import ReportGenerator
from ssacl.losses.warp import patch_centres
from ssacl.models.findings import soft_maximum_at
from ssacl.models.findings_head import CELLS, FindingsRead

GRID = 8
POSE = torch.tensor([[0.75, 0.05], [-0.05, 0.7]])
SHIFT = torch.tensor([0.1, 0.0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def generator(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ReportGenerator:
    """The leaves of this model attend where a patient in `POSE` has them; an effusion shows at the left base and nowhere else."""
    torch.set_num_threads(1)
    generator = ReportGenerator.load(folder)
    encode = generator._model.encode
    places = torch.tensor(CHART) @ POSE.T + SHIFT
    points = patch_centres(GRID)
    leaf_MN = torch.exp(-(points[None] - places[:, None]).square().sum(-1) / (2 * 0.15**2))

    def grounded(image: torch.Tensor):
        encoded = encode(image)
        attention = encoded.attention_BGN.clone()
        for node in NODES:
            attention[:, NODE_INDEX[node]] = leaf_MN[[LEAVES.index(leaf) for leaf in leaves_below(node)]].sum(0)
        attention = attention / attention.sum(-1, keepdim=True)
        return dataclasses.replace(encoded, attention_BGN=attention)

    def seen(encoded: object) -> FindingsRead:
        """An effusion at the left costophrenic angle: in the cells of the atlas' frame, and so at the leaves."""
        image = torch.full((1, 14), -5.0)
        cells = torch.full((1, 14, CELLS, CELLS), -4.0)
        at = torch.tensor(CHART[LEAVES.index("left costophrenic angle")])
        spot = 8 * torch.exp(-(patch_centres(CELLS) - at).square().sum(-1) / (2 * 0.3**2)) - 4
        image[:, FINDING_INDEX["Pleural Effusion"]] = 3.0
        cells[:, FINDING_INDEX["Pleural Effusion"]] = spot.view(CELLS, CELLS)
        weights = generator._model.findings_head.leaf_cells_MK
        return FindingsRead(image, soft_maximum_at(cells.flatten(2).transpose(1, 2), weights), cells)

    monkeypatch.setattr(generator._model, "encode", grounded)
    monkeypatch.setattr(generator._model, "findings_read", seen)
    return generator


def picture() -> Picture:
    return read_picture(encoded_film("PNG", 128, 128, 0), "film")


def _centroid(evidence: np.ndarray) -> np.ndarray:
    ticks = (np.arange(len(evidence)) * 2 + 1) / len(evidence) - 1
    return np.array([evidence.sum(0) @ ticks, evidence.sum(1) @ ticks])


def test_anatomy_lies_where_the_leaves_attention_puts_the_drawing(generator: ReportGenerator) -> None:
    leaves = ["left costophrenic angle", "right hilar structures", "carina", "right lower lung zone"]
    for leaf, found in zip(leaves, generator.ground(picture(), leaves), strict=True):
        assert found.anatomy == (leaf,)
        expected = (torch.tensor(CHART) @ POSE.T + SHIFT)[LEAVES.index(leaf)].numpy()
        assert np.abs(_centroid(found.evidence) - expected).max() < 0.1, leaf
        assert found.evidence.shape == (2 * GRID, 2 * GRID)
        assert found.evidence.sum() == pytest.approx(1, abs=1e-4)
    heart = generator.ground(picture(), ["cardiac silhouette"])[0]
    atrium = generator.ground(picture(), ["right atrium"])[0]
    assert _centroid(heart.evidence)[0] > _centroid(atrium.evidence)[0] + 0.1, "the heart reaches to the patient's left"


def test_the_same_finding_on_opposite_sides_gives_different_maps_and_only_one_is_believed(generator: ReportGenerator) -> None:
    left, right = generator.ground(picture(), ["left pleural effusion", "right pleural effusion"])
    assert left.finding == right.finding == "Pleural Effusion"
    middle = float(SHIFT[0])
    assert _centroid(left.evidence)[0] > middle + 0.2
    assert _centroid(right.evidence)[0] < middle - 0.2
    assert np.corrcoef(left.evidence.ravel(), right.evidence.ravel())[0, 1] < 0.2
    assert not left.names_nothing
    assert left.reason == ""
    assert left.confidence > 0.9
    assert right.names_nothing
    assert right.confidence < 0.2
    assert "Pleural Effusion is not seen there" in right.reason


def test_a_phrase_that_names_nothing_in_the_film_says_so(generator: ReportGenerator) -> None:
    absent, unknown = generator.ground(picture(), ["right pneumothorax", "the quick brown fox"])
    assert absent.names_nothing
    assert absent.confidence < 0.05
    assert "Pneumothorax is not seen there" in absent.reason
    assert (unknown.names_nothing, unknown.confidence) == (True, 0.0)
    assert "no anatomy and no finding" in unknown.reason
    tree = json.loads(json.dumps(unknown.to_json(), allow_nan=False))
    assert tree["names_nothing"] is True


@pytest.mark.parametrize("phrase", ["", "  \n", "effusion " * 60])
def test_a_phrase_without_words_or_without_end_is_refused(generator: ReportGenerator, phrase: str) -> None:
    with pytest.raises(GenerationError, match="1 to 500"):
        generator.ground(picture(), [phrase])
