"""Pointing of a finished model at true masks, against the score card's figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluation_place import make_place

from ssacl.anatomy import NODES
from ssacl.data.dicom import read_picture
from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.errors import DataError
from ssacl.evaluation.grounding import choose_threshold, grounding_scores
from ssacl.evaluation.predictions import sample_digest
from ssacl.evaluation.quick import anatomy_pointing
from ssacl.evaluation.truth import load_truth, true_masks
from ssacl.inference.generator import ReportGenerator


def test_pointing_is_the_score_cards_over_all_masks_of_the_first_films(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    storage, generator = open_storage(str(place.data)), ReportGenerator.load(str(place.model), "cpu")
    samples = [read_sample(storage, entry) for entry in open_split(storage, "val", purpose="validation")[:3]]
    maps = np.stack([generator.look(read_picture(sample.image)).anatomy_maps for sample in samples])
    masks = true_masks(load_truth(place.truth), [sample_digest(sample) for sample in samples])
    nodes = grounding_scores(maps, masks, choose_threshold(maps, masks, sigma_cells=0.0), sigma_cells=0.0).nodes
    hits = sum((nodes[node].pointing or 0.0) * nodes[node].num_cases for node in NODES)
    expected = hits / sum(nodes[node].num_cases for node in NODES)
    assert anatomy_pointing(str(place.model), str(place.data), str(place.truth), 3) == pytest.approx(expected)
    assert 0 < expected < 1
    with pytest.raises(DataError):
        anatomy_pointing(str(place.model), str(place.data), str(tmp_path / "nowhere"), 3)
