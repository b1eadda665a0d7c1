"""The figures that validations of a run give, of a finished model on the test split."""

from __future__ import annotations

from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
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
