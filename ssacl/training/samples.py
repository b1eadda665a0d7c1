"""What the model writes about one film of the validation split while it trains: the report as text, its evidence as a picture.

The picture shows the film itself, so that the run's storage deserves the protection of the data set's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from ssacl.config import Config
from ssacl.data.dicom import read_picture
from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import Storage
from ssacl.data.tokenization import Tokenizers
from ssacl.errors import SSACLError
from ssacl.inference.evidence import overlay_png
from ssacl.inference.generator import GenerationOptions, ReportGenerator
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import LoadedModel

logger = logging.getLogger(__name__)

FOLDER = "samples"
_OPTIONS = GenerationOptions(num_beams=1, max_new_tokens=80, time_limit_s=120.0)


class SampleReports:
    """Writes `samples/NAME.txt` and `samples/NAME.png` into a run's storage."""

    def __init__(self, config: Config, tokenizers: Tokenizers, data: Storage, storage: Storage, device: torch.device) -> None:
        self._config, self._tokenizers, self._device = config, tokenizers, device
        self._data, self._storage = data, storage.sub(FOLDER)

    def write(self, model: SSACL, thresholds: Mapping[str, float], name: str) -> None:
        """Let `model` describe the first film of the validation split; leaves random numbers as they were.

        A film that cannot be described is a warning: the run goes on.
        """
        try:
            entry = open_split(self._data, "val", purpose="validation")[0]
            picture = read_picture(read_sample(self._data, entry).image)
            manifest = {"model_version": name}
            loaded = LoadedModel(model, self._config, self._tokenizers, dict(thresholds), manifest)
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                draft = ReportGenerator(loaded, self._device).generate([picture], _OPTIONS)[0]
            findings = (
                ", ".join(f"{item.name} {item.probability:.2f}" for item in draft.findings if item.present) or "none above its threshold"
            )
            lines = [draft.disclaimer, "", *(sentence.text for sentence in draft.sentences), "", f"Findings head: {findings}"]
            self._storage.write(f"{name}.png", overlay_png(picture.pixels, draft))
            self._storage.write(f"{name}.txt", ("\n".join(lines) + "\n").encode())
        except SSACLError as error:
            logger.warning("no sample report %s: %s", name, error)
