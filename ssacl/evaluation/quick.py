"""A few figures of a model on a few films, cheap enough for every validation of a run: they rank models, a score card describes one.

The maps' agreement under mirroring needs no label, and is high for maps that never move: it is worth something beside other figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssacl.data.dicom import read_picture
from ssacl.data.loader import open_split
from ssacl.data.records import Sample
from ssacl.data.reports import training_text
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.evaluation.clinical import report_f1
from ssacl.evaluation.map_measures import map_centroids
from ssacl.evaluation.mirror import mirror_picture, twins_agree
from ssacl.inference.generator import GenerationOptions, ReportGenerator
from ssacl.training.checkpoint import LoadedModel, open_model

_CHUNK = 16


def quick_figures(loaded: LoadedModel, samples: Sequence[Sample], device: str = "cpu", with_reports: bool = True) -> dict[str, float]:
    """Score a model on a few films.

    Parameters
    ----------
    with_reports
        Whether the model has learned to write.

    Returns
    -------
    dict
        `mirror_agreement`: share of nodes whose map on the mirrored film lies where its twin's is mirrored to. `findings_f1`: micro-F1
        over 14 findings, stated by greedy reports against the references, read by the same labeler; not without reports.

    Raises
    ------
    GenerationError
        The weights give values that are not finite.
    """
    generator = ReportGenerator(loaded, device)
    pictures = [read_picture(sample.image) for sample in samples]
    agree = []
    for picture in pictures:
        plain, turned = (map_centroids(generator.look(each).anatomy_maps[None])[0] for each in (picture, mirror_picture(picture)))
        agree.append(twins_agree(plain, turned))
    figures = {"mirror_agreement": float(np.mean(agree))}
    if with_reports:
        data = loaded.config.data
        options = GenerationOptions(num_beams=1, max_new_tokens=data.lm_max_tokens, time_limit_s=None, max_batch_size=_CHUNK)
        reports = [draft.text for draft in generator.generate(pictures, options)]
        references = [training_text(sample, data.sections) for sample in samples]
        figures["findings_f1"] = report_f1(reports, references, data.uncertain).micro["14"].f1
    return figures


def final_figures(model_url: str, data_url: str, num_films: int) -> dict[str, float]:
    """`quick_figures` of a finished model on the first films of the test split; without reports where it has not learned to write them."""
    storage = open_storage(data_url)
    entries = open_split(storage, "test", purpose="evaluation")[:num_films]
    loaded = open_model(model_url, "cpu")
    stages = set(loaded.manifest.get("provenance", {}).get("stages", ()))
    writes = bool(loaded.config.run.init_from) or ("findings" in stages and bool({"generation", "joint"} & stages))
    return quick_figures(loaded, [read_sample(storage, entry) for entry in entries], with_reports=writes)
