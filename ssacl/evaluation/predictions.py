"""A checkpoint's answers on shard samples: what one process does with its share of a split.

Shape letters: n cases, F = 14 findings, G = 32 nodes, g grid side of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.data.dicom import read_picture
from ssacl.data.records import Sample
from ssacl.data.reports import training_text
from ssacl.data.shards import SampleEntry, read_sample
from ssacl.data.storage import open_storage
from ssacl.inference.evidence import evidence_sheet_png
from ssacl.inference.generator import GenerationOptions, ReportGenerator
from ssacl.training.checkpoint import LoadedModel, open_model

MAPS_ONLY = {"num_beams": 1, "max_new_tokens": 1}
"""Generation settings where only findings and maps are wanted: the text costs next to nothing."""


@dataclass(frozen=True)
class Work:
    """A few samples, and how to generate for them."""

    entries: tuple[SampleEntry, ...]
    options: GenerationOptions
    with_maps: bool = True
    """Maps take a hundred times the room of the rest, and only truth has a use for them."""


@dataclass(frozen=True)
class Predictions:
    """Answers and references of n cases, in one order."""

    keys: tuple[str, ...]
    digests: tuple[str, ...]
    """Pixel digests that ingest kept: they find a case's truth."""
    reports: tuple[str, ...]
    references: tuple[str, ...]
    """Whole text of the sections that the model writes; empty where the study has no report."""
    status: NDArray[np.int64] = field(repr=False)
    """[n, F] `FindingStatus` of the samples' labels; unmentioned throughout where there are none."""
    labelled: NDArray[np.bool_] = field(repr=False)
    """[n]."""
    probabilities: NDArray[np.float64] = field(repr=False)
    """[n, F] of the findings head."""
    maps: NDArray[np.float32] = field(repr=False)
    """[n, G, g, g] smoothed, each sums to 1, over the model's square; g is 0 where none were asked for."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, index: Sequence[int]) -> Predictions:
        """The cases at `index`, in that order."""
        rows = np.asarray(index, dtype=np.int64)
        picked: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            picked[item.name] = value[rows] if isinstance(value, np.ndarray) else tuple(value[row] for row in rows)
        return Predictions(**picked)

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """All parts one after the other; there is at least one."""
        joined: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            values = [getattr(part, item.name) for part in parts]
            joined[item.name] = (
                np.concatenate(values) if isinstance(values[0], np.ndarray) else tuple(each for part in values for each in part)
            )
        return cls(**joined)


class Runner(Protocol):
    """Answers work in this process, or in several."""

    def describe(self) -> dict[str, Any]:
        """The checkpoint: see `SplitPredictor.describe`."""

    def run(self, work: Sequence[Work]) -> Iterator[Predictions]:
        """One `Predictions` per piece of work, in any order."""

    def sheets(self, work: Work) -> list[bytes]:
        """Evidence sheets of a few cases: see `SplitPredictor.sheets`."""


class SplitPredictor:
    """Runs a checkpoint on samples of a data set, in this process or as an actor.

    Parameters
    ----------
    checkpoint_url
        Model folder, or s3:// prefix of one.
    data_url
        Data set root.

    Raises
    ------
    CheckpointError
        The model cannot be loaded.
    """

    def __init__(self, checkpoint_url: str, data_url: str, device: str = "cpu") -> None:
        self._loaded = open_model(checkpoint_url, device)
        self._generator = ReportGenerator(self._loaded, device)
        self._storage = open_storage(data_url)
        self._sections = self._loaded.config.data.sections

    def describe(self) -> dict[str, Any]:
        """What a score card says of the checkpoint, and the settings that scores depend on."""
        return describe_checkpoint(self._loaded) | {
            "sections": self._sections,
            "uncertain": self._loaded.config.data.uncertain,
            "thresholds": dict(self._loaded.thresholds),
        }

    def run(self, work: Sequence[Work]) -> Iterator[Predictions]:
        """See `Runner`."""
        for each in work:
            yield self.predict(each)

    def sheets(self, work: Work) -> list[bytes]:
        """Evidence sheets (PNG) of one piece of work, in its order; see `predict` for the errors."""
        pictures = [read_picture(read_sample(self._storage, entry).image) for entry in work.entries]
        drafts = self._generator.generate(pictures, work.options)
        return [evidence_sheet_png(picture.pixels, draft) for picture, draft in zip(pictures, drafts, strict=True)]

    def predict(self, work: Work) -> Predictions:
        """Answers for one piece of work, in its order.

        Raises
        ------
        DataError, StorageError
            A sample cannot be read: scores over fewer cases would be other scores, so nothing is skipped.
        GenerationError
            The model cannot write, or its weights are damaged.
        """
        samples = [read_sample(self._storage, entry) for entry in work.entries]
        drafts = self._generator.generate([read_picture(sample.image) for sample in samples], work.options)
        return Predictions(
            keys=tuple(sample.key for sample in samples),
            digests=tuple(sample_digest(sample) for sample in samples),
            reports=tuple(draft.text for draft in drafts),
            references=tuple(training_text(sample, self._sections) for sample in samples),
            status=np.array([sample_status(sample) for sample in samples], dtype=np.int64),
            labelled=np.array([bool(sample.labels) for sample in samples]),
            probabilities=np.array([[finding.probability for finding in draft.findings] for draft in drafts]),
            maps=np.stack([draft.anatomy_maps if work.with_maps else draft.anatomy_maps[:, :0, :0] for draft in drafts]),
        )


def describe_checkpoint(loaded: LoadedModel) -> dict[str, Any]:
    """`checkpoint` and `config` of a score card."""
    manifest = loaded.manifest
    return {
        "checkpoint": {
            "model_version": loaded.model_version,
            "files_sha256": manifest["files"],
            "code_version": manifest.get("code_version", ""),
            "provenance": manifest.get("provenance", {}),
        },
        "config": loaded.config.model_dump(mode="json", exclude={"data": {"url"}, "run": {"storage_url"}}),
    }


def sample_digest(sample: Sample) -> str:
    """The pixel digest of the film that a sample was made from; empty where ingest kept none."""
    return str(sample.provenance.get("content_sha256", ""))


def sample_status(sample: Sample) -> tuple[int, ...]:
    """[14] `FindingStatus` of a sample's labels."""
    return sample.labels or (int(FindingStatus.UNMENTIONED),) * len(FINDINGS)
