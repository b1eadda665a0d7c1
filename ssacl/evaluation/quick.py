"""Figures of a finished model on a few films, for ranking: those of a run's validations, on test; and pointing, which needs masks."""

from __future__ import annotations

import numpy as np

from ssacl.data.dicom import read_picture
from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.evaluation.predictions import sample_digest
from ssacl.evaluation.truth import load_truth, true_masks
from ssacl.inference.generator import ReportGenerator
from ssacl.scores.map_measures import measure
from ssacl.scores.quick import quick_figures
from ssacl.training.checkpoint import open_model


def final_figures(model_url: str, data_url: str, num_films: int) -> dict[str, float]:
    """`quick_figures` of a finished model on the first films of the test split; without reports where it has not learned to write them."""
    storage = open_storage(data_url)
    entries = open_split(storage, "test", purpose="evaluation")[:num_films]
    loaded = open_model(model_url, "cpu")
    stages = set(loaded.manifest.get("provenance", {}).get("stages", ()))
    writes = bool(loaded.config.run.init_from) or ("findings" in stages and bool({"generation", "joint"} & stages))
    return quick_figures(loaded, [read_sample(storage, entry) for entry in entries], with_reports=writes)


def anatomy_pointing(model_url: str, data_url: str, truth_folder: str, num_films: int, split: str = "val") -> float:
    """Share of the anatomy nodes in the first films of a split whose map's maximum lies in the node's mask, or beside it (`HIT_RADIUS`).

    Raises
    ------
    DataError
        The truth is not there, or belongs to other films.
    """
    storage, truth = open_storage(data_url), load_truth(truth_folder)
    samples = [read_sample(storage, entry) for entry in open_split(storage, split, purpose="evaluation")[:num_films]]
    generator = ReportGenerator(open_model(model_url, "cpu"), "cpu")
    maps = np.stack([generator.look(read_picture(sample.image)).anatomy_maps for sample in samples])
    measured = measure(maps, true_masks(truth, [sample_digest(sample) for sample in samples]), sigma_cells=0.0)
    return float(measured.hit[measured.shown].mean())
