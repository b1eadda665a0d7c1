"""What a validation scores beside its losses: reports and maps of a few films (`run.num_figure_films`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ssacl.config import Config
from ssacl.data.loader import open_split
from ssacl.data.records import Sample
from ssacl.data.shards import read_sample
from ssacl.data.storage import Storage
from ssacl.data.tokenization import Tokenizers
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import LoadedModel


class ValidationFigures:
    """Scores the model on the first `run.num_figure_films` films of the validation split; on rank 0."""

    def __init__(self, config: Config, tokenizers: Tokenizers, data: Storage, device: torch.device) -> None:
        self._config, self._tokenizers, self._data, self._device = config, tokenizers, data, device
        self._samples: list[Sample] = []

    def of(self, model: SSACL, thresholds: Mapping[str, float], with_reports: bool) -> dict[str, float]:
        """See `ssacl.scores.quick.quick_figures`; leaves random numbers and the model's mode as they were."""
        from ssacl.scores.quick import quick_figures

        if not self._samples:
            entries = open_split(self._data, "val", purpose="validation")[: self._config.run.num_figure_films]
            self._samples = [read_sample(self._data, entry) for entry in entries]
        loaded = LoadedModel(model, self._config, self._tokenizers, dict(thresholds), {"model_version": "in training"})
        was_training = model.training
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            try:
                return quick_figures(loaded, self._samples, str(self._device), with_reports)
            finally:
                model.train(was_training)
