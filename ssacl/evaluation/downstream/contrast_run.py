"""A split in the space of the global contrast: what zero-shot classification and retrieval share before they compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssacl.data.labeler import Uncertain
from ssacl.data.loader import open_split
from ssacl.data.shards import SampleEntry, ShardIndex, read_sample
from ssacl.data.storage import Storage, open_storage
from ssacl.errors import DataError, SplitError
from ssacl.evaluation.cases import claim_folder
from ssacl.evaluation.downstream.contrast import Embedded, embed_split, require_contrast
from ssacl.evaluation.downstream.prompts import SIDES, Prompts
from ssacl.evaluation.downstream.task_card import unseen_films
from ssacl.evaluation.predictions import sample_digest
from ssacl.training.checkpoint import LoadedModel, open_model

KEPT = "kept"


@dataclass(frozen=True)
class ContrastOptions:
    """What is evaluated."""

    split: str = "test"
    """val or test of an ingested data set."""
    findings: tuple[str, ...] = ()
    """Those to score; empty: all that have prompts."""
    uncertain: Uncertain | None = None
    """What an uncertain label counts as; the checkpoint's policy if none."""
    limit: int | None = None
    seed: int = 0
    trained_films: str = "refuse"
    trained_on: str = ""


@dataclass(frozen=True)
class ContrastRun:
    """A split in the space of the global contrast, and what a card says of it."""

    loaded: LoadedModel
    storage: Storage
    entries: tuple[SampleEntry, ...]
    embedded: Embedded
    folder: Path
    data: dict[str, Any]
    settings: dict[str, Any]
    """`uncertain`, `seed`, `training_films`, `prompts` and `policies`."""


def run_contrast(
    checkpoint_url: str | Path,
    data_url: str | Path,
    out_folder: str | Path,
    prompts: Prompts,
    options: ContrastOptions,
    settings: dict[str, Any],
    start: Callable[[int], None] | None,
    progress: Callable[[int], None] | None,
) -> ContrastRun:
    """Embed a split for `zero_shot` or `retrieval`; see there. `settings` are the task's own."""
    loaded = open_model(checkpoint_url)
    require_contrast(loaded)
    pairs = prompts.of(options.findings)
    storage = open_storage(str(data_url))
    if options.split == "train":
        raise SplitError("The training split cannot be scored; give --split test or val.")
    found = open_split(storage, options.split, purpose="evaluation")[: options.limit]
    if not found:
        raise DataError(f"A limit of {options.limit} leaves no case of the split '{options.split}'; give at least 1.")
    sha256 = ShardIndex.load(storage).digest

    def digest(entry: SampleEntry) -> str:
        return sample_digest(read_sample(storage, entry))

    entries, trained_films = unseen_films(loaded, found, digest, sha256, options.trained_films, options.trained_on)
    data = {"sha256": sha256, "split": options.split, "num_cases": len(entries), "limit": options.limit}
    uncertain: Uncertain = options.uncertain or loaded.config.data.uncertain
    told = {
        "prompts": {
            "sha256": prompts.sha256,
            "findings": {name: {side: list(getattr(pair, side)) for side in SIDES} for name, pair in pairs.items()},
        },
        "uncertain": uncertain,
        "sections": loaded.config.data.sections,
        "seed": options.seed,
        **settings,
    }
    folder = claim_folder(out_folder, KEPT, {"checkpoint": loaded.manifest["files"], "data": data, **told})
    if start is not None:
        start(len(entries))
    embedded = embed_split(loaded, storage, entries, folder / KEPT, progress)
    return ContrastRun(loaded, storage, entries, embedded, folder, data, told | {"training_films": trained_films})
