"""The model deployment: one `ReportGenerator` per replica, requests read in batches."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve

from serve.settings import ServeSettings
from ssacl.data.dicom import Picture
from ssacl.errors import SSACLError
from ssacl.inference.generator import ReportGenerator
from ssacl.inference.report import DraftReport

Outcome = DraftReport | SSACLError


class ModelReplica:
    """Loads the model once; reads pictures in dynamic batches in a thread, so that health checks are answered meanwhile."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch

        self._settings = ServeSettings.parse(settings)
        torch.set_num_threads(self._settings.num_threads)
        device = "cuda" if self._settings.gpus_per_replica > 0 else "cpu"
        self._generator = ReportGenerator.load(self._settings.checkpoint_url, device)
        self._read.set_max_batch_size(self._settings.max_batch_size)
        self._read.set_batch_wait_timeout_s(self._settings.batch_wait_s)

    async def report(self, picture: Picture) -> DraftReport:
        """The draft of one picture; raises the named error of this picture alone."""
        outcome: Outcome = await self._read(picture)
        if isinstance(outcome, SSACLError):
            raise outcome
        return outcome

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.02)
    async def _read(self, pictures: list[Picture]) -> list[Outcome]:
        return await asyncio.to_thread(self._generate, pictures)

    def _generate(self, pictures: list[Picture]) -> list[Outcome]:
        try:
            return list(self._generator.generate(pictures, self._settings.generation))
        except SSACLError as error:
            if len(pictures) == 1:
                return [error]
            # One picture must not fail its neighbours in the batch.
            return [outcome for picture in pictures for outcome in self._generate([picture])]

    async def describe(self) -> dict[str, Any]:
        """Version and provenance of the loaded model."""
        return self._generator.describe()
