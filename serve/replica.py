"""The model deployment: a `ReportGenerator` for each model of a replica, requests read in batches; models change while it serves."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from serve.batches import Batches
from serve.settings import ModelSettings
from ssacl.data.dicom import Picture
from ssacl.errors import ConfigError, ServeError, SSACLError
from ssacl.gpu import require_gpu
from ssacl.inference.generator import ReportGenerator
from ssacl.inference.report import DraftReport
from ssacl.registry.addresses import resolve_model

logger = logging.getLogger(__name__)
Outcome = DraftReport | SSACLError
Asked = tuple[Picture, str | None]


class ModelReplica:
    """Loads the models; reads pictures in dynamic batches in a thread, so that health checks are answered meanwhile.

    Parameters
    ----------
    num_threads
        Of torch.
    device
        "cpu" or "cuda".
    batch_limit_s
        A batch that takes longer makes the replica unhealthy, and Serve starts another.

    Raises
    ------
    ClusterError
        "cuda", and PyTorch finds no GPU.
    """

    def __init__(self, num_threads: int, device: str, batch_limit_s: float) -> None:
        import torch

        torch.set_num_threads(num_threads)
        if device == "cuda":
            require_gpu()
        self._device, self._batch_limit_s = device, batch_limit_s
        self._settings: ModelSettings | None = None
        self._models: dict[str | None, ReportGenerator] = {}
        self._by_url: dict[str, ReportGenerator] = {}
        self._following: asyncio.Task[None] | None = None
        self._batches: Batches[Asked, Outcome] = Batches(self._outcomes)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take a model configuration: the first is waited for; later ones load beside the models that serve, which then give place.

        From then on the channels that it names are followed: when one has moved, its new version is loaded in the same way.

        Raises
        ------
        ConfigError
            A setting is unknown or out of range: what served goes on serving.
        CheckpointError, RegistryError
            A model of the first configuration cannot be found or read.
        """
        settings = ModelSettings.parse(user_config)
        if self._settings is None:
            await self._load(settings)
        if self._following is not None:
            self._following.cancel()
        self._following = asyncio.create_task(self._follow(settings))

    async def _follow(self, settings: ModelSettings) -> None:
        while True:
            try:
                await self._load(settings)
            except (SSACLError, OSError) as error:
                logger.error("a model cannot be loaded, what served before serves on; the next try in %g s: %s", settings.follow_s, error)
            await asyncio.sleep(settings.follow_s)

    async def _load(self, settings: ModelSettings) -> None:
        addresses = {None: settings.checkpoint_url, **settings.more_models}
        urls = {name: await asyncio.to_thread(resolve_model, address) for name, address in addresses.items()}
        same_precision = self._settings is not None and self._settings.precision == settings.precision
        # A model that serves already, under whatever name, is not read again.
        loaded = {url: model for url, model in self._by_url.items() if same_precision and url in urls.values()}
        for url in urls.values():
            if url not in loaded:
                loaded[url] = await asyncio.to_thread(ReportGenerator.load, url, self._device, settings.precision)
        models = {name: loaded[url] for name, url in urls.items()}
        if models != self._models:
            logger.info("serving %s", ", ".join(sorted({model.model_version for model in loaded.values()})))
        # In one step: a batch under way keeps the model that it has.
        self._models, self._by_url, self._settings = models, loaded, settings
        self._batches.max_batch_size, self._batches.wait_s = settings.max_batch_size, settings.batch_wait_s

    async def report(self, picture: Picture, model: str | None = None) -> DraftReport:
        """The draft of one picture by the first or a named model; raises the named error of this picture alone."""
        if model not in self._models:
            raise ConfigError(
                f"There is no model of that name here; models: {', '.join(filter(None, self._models)) or 'one without a name'}."
            )
        outcome = await self._batches.outcome((picture, model))
        if isinstance(outcome, SSACLError):
            raise outcome
        return outcome

    def _outcomes(self, asked: list[Asked]) -> list[Outcome]:
        models, settings = self._models, self._settings
        assert settings is not None
        outcomes: dict[int, Outcome] = {}
        for name in dict.fromkeys(name for _, name in asked):
            places = [place for place, (_, own) in enumerate(asked) if own == name]
            # Gone while the request waited: the first model stands in, and the draft says which it was.
            generator = models.get(name) or models[None]
            drafts = _generate(generator, [asked[place][0] for place in places], settings)
            outcomes.update(zip(places, drafts, strict=True))
        return [outcomes[place] for place in range(len(asked))]

    async def describe(self) -> dict[str, Any]:
        """Version and provenance of the first model."""
        return self._models[None].describe()

    async def describe_all(self) -> list[dict[str, Any]]:
        """The same of every model, with its name."""
        return [{**model.describe(), "name": name} for name, model in self._models.items()]

    def check_health(self) -> None:
        """Serve's question now and then.

        Raises
        ------
        ServeError
            A batch hangs.
        """
        if self._batches.busy_since is not None and time.monotonic() - self._batches.busy_since > self._batch_limit_s:
            raise ServeError(f"A batch has taken more than {self._batch_limit_s:.0f} s.")


def _generate(generator: ReportGenerator, pictures: list[Picture], settings: ModelSettings) -> list[Outcome]:
    try:
        return list(generator.generate(pictures, settings.generation.model_copy(update={"max_batch_size": len(pictures)})))
    except SSACLError as error:
        if len(pictures) == 1:
            return [error]
        # One picture must not fail its neighbours in the batch.
        return [outcome for picture in pictures for outcome in _generate(generator, [picture], settings)]
