"""The findings stage's data: the training split through the frozen encoder once, then as many passes over what it gave as wanted.

The encoder does not change in this stage, so its part of a step is the same in every epoch; kept, a step costs the small head alone.
About 20 KB a sample, on every rank.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ssacl.anatomy import TWIN_LEAVES
from ssacl.data.loader import StreamingLoader
from ssacl.data.order import EpochOrder
from ssacl.data.records import Batch
from ssacl.errors import DataError
from ssacl.models.findings_head import FindingsBatch, FindingsInputs, sample
from ssacl.models.ssacl import SSACL
from ssacl.training.resume import gather_objects

JITTER = 0.04
"""Deviation of the random affine map of a registered film: registration is not perfect."""
MIRRORED_SHARE = 0.5
"""Of the rows: every film teaches both sides."""


@dataclass(frozen=True)
class FrozenSamples:
    """Every labelled training sample, in the order of its key, the same on every rank."""

    inputs: FindingsInputs
    """Floats in half precision."""
    labels: Tensor
    entities: Tensor
    """[n, M, F] uint8."""
    has_text: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, seed: int, micro_batch_size: int, world_rank: int, world_size: int, first: int = 0) -> Iterator[FindingsBatch]:
        """This rank's micro batches without end, from the `first` on.

        Order, jitter and mirror are a pure function of (seed, place in the stream): the global batch does not depend on how it is spread.
        A mirrored film has its leaves' findings mirrored; findings of the film have no side.
        """
        position = (first * world_size + world_rank) * micro_batch_size
        while True:
            places = range(position, position + micro_batch_size)
            numbers = torch.tensor([EpochOrder(len(self), seed, place // len(self))[place % len(self)] for place in places])
            draws = [np.random.default_rng((seed, place)) for place in places]
            theta = torch.eye(2, 3) + JITTER * torch.from_numpy(np.stack([draw.standard_normal((2, 3)) for draw in draws])).float()
            mirrored_B = torch.tensor([draw.random() < MIRRORED_SHARE for draw in draws])
            film_B1RR = sample(self.inputs.registered_B1RR[numbers].float(), theta)
            film_B1RR = torch.where(mirrored_B[:, None, None, None], film_B1RR.flip(-1), film_B1RR)
            entities_BMF = self.entities[numbers].long()
            entities_BMF = torch.where(mirrored_B[:, None, None], entities_BMF[:, list(TWIN_LEAVES)], entities_BMF)
            inputs = FindingsInputs(film_B1RR, self.inputs.pooled_BD[numbers].float())
            has_labels = torch.ones(len(numbers), dtype=torch.bool)
            yield FindingsBatch(inputs, self.labels[numbers], has_labels, entities_BMF, self.has_text[numbers])
            position += world_size * micro_batch_size


@torch.no_grad()
def freeze_samples(model: SSACL, loader: StreamingLoader, device: torch.device) -> FrozenSamples:
    """Encode one epoch of `loader` (evaluation rows: no augmentation), each rank its share, and gather all of it on every rank.

    Raises
    ------
    DataError
        No sample has labels.
    """
    model.eval()
    rows: dict[str, tuple[Any, ...]] = {}
    with closing(cast("Generator[Batch]", iter(loader))) as batches:
        _collect(model, batches, loader.steps_per_epoch, device, rows)
    merged = {key: value for part in gather_objects(rows) for key, value in part.items()}
    if not merged:
        raise DataError("No training sample has labels or a report, so the findings head has nothing to learn from; leave the stage out.")
    columns = [torch.from_numpy(np.stack(column)) for column in zip(*(merged[key] for key in sorted(merged)), strict=True)]
    return FrozenSamples(FindingsInputs(*columns[:2]), *columns[2:])


def _collect(model: SSACL, batches: Iterator[Batch], num_batches: int, device: torch.device, rows: dict[str, tuple[Any, ...]]) -> None:
    for _ in range(num_batches):
        batch = next(batches)
        inputs = model.findings_inputs(model.encode(batch.image.to(device)))
        floats = [value.half().cpu().numpy() for value in (inputs.registered_B1RR, inputs.pooled_BD)]
        others = [value.numpy() for value in (batch.labels, batch.entities.to(torch.uint8), batch.has_text)]
        for row, key in enumerate(batch.keys):
            if bool(batch.has_labels[row]):
                rows[key] = tuple(array[row] for array in (*floats, *others))
