"""Where a run stands: its checkpoints in storage, each complete or invisible, and the state of random numbers.

<run.storage_url>/<run.name>/
    checkpoints/SS-KKKKKKKK/   stage SS (0-based) after KKKKKKKK optimizer steps; manifest.json last
    model/                     the exported model folder, when the run is finished
    metrics.jsonl, training.png, tensorboard/, samples/
    run.lock                   while a run of this name is alive
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssacl.config import Config
from ssacl.data.storage import Storage, open_storage
from ssacl.errors import CheckpointError, SSACLError, TrainingError
from ssacl.training.sealed import MANIFEST, download_folder, folder_hashes, parse_manifest, seal

logger = logging.getLogger(__name__)

_NAME = re.compile(r"^checkpoints/(\d{2})-(\d{8})/manifest\.json$")


@dataclass(frozen=True, order=True)
class Position:
    """`step` optimizer steps of stage `stage_index` are done."""

    stage_index: int
    step: int

    @property
    def prefix(self) -> str:
        return f"checkpoints/{self.stage_index:02d}-{self.step:08d}"


def run_storage(config: Config) -> Storage:
    """Where a run keeps its checkpoints, metrics and model: `(run.storage_url, run.name)`."""
    return open_storage(config.run.storage_url).sub(config.run.name)


class RunStore:
    """The checkpoints of one run. `latest`, `save` and `fetch` are called by all ranks together."""

    def __init__(self, storage: Storage, world_rank: int = 0) -> None:
        self.storage, self._world_rank = storage, world_rank

    def latest(self) -> tuple[Position, dict[str, Any]] | None:
        """The furthest complete checkpoint and its manifest; the same answer on every rank."""

        def look() -> tuple[Position, dict[str, Any]] | None:
            positions = self.positions()
            if not positions:
                return None
            content = self.storage.read(f"{positions[-1].prefix}/{MANIFEST}")
            return positions[-1], parse_manifest(content, positions[-1].prefix)

        found: tuple[Position, dict[str, Any]] | None = on_rank_0(look, self._world_rank)
        return found

    def positions(self) -> list[Position]:
        """Complete checkpoints, oldest first."""
        matches = (_NAME.match(item.key) for item in self.storage.list("checkpoints/"))
        return sorted(Position(int(match[1]), int(match[2])) for match in matches if match)

    def save(self, position: Position, write: Callable[[Path], None], entries: Mapping[str, Any]) -> None:
        """Let every rank `write` its part into a folder of its own, upload the parts, then the manifest.

        Raises
        ------
        SSACLError
            A rank could not write or upload; raised on every rank.
        """
        with tempfile.TemporaryDirectory(prefix="ssacl-checkpoint-") as parent:
            folder = Path(parent)
            failure, hashes = "", {}
            target = self.storage.sub(position.prefix)
            try:
                write(folder)
                hashes = folder_hashes(folder)
                for name in hashes:
                    target.upload(name, folder / name)
            except SSACLError as error:
                failure = str(error)
            # Whatever it is: the other ranks wait for an answer. PyTorch's writer raises a RuntimeError on a full disk.
            except Exception as error:
                failure = (
                    f"{getattr(error, 'strerror', None) or type(error).__name__}. Free space in {tempfile.gettempdir()}, or set TMPDIR."
                )
            parts = gather_objects((failure, hashes))
            failures = [text for text, _ in parts if text]
            if failures:
                raise CheckpointError(
                    f"The checkpoint {position.prefix} could not be stored: {failures[0]} Earlier checkpoints are untouched."
                )
            merged = {name: digest for _, part in parts for name, digest in part.items()}

            def commit() -> None:
                seal(folder, entries, merged)
                target.upload(MANIFEST, folder / MANIFEST)

            on_rank_0(commit, self._world_rank)

    def fetch(self, position: Position, into: Path) -> Path:
        """Download and verify a checkpoint, on every rank."""
        return download_folder(self.storage, position.prefix, into)

    def prune(self, keep_last: int) -> None:
        """Drop all but the newest `keep_last` checkpoints; the manifest goes first, so that none is ever half there."""
        for position in self.positions()[:-keep_last]:
            self.storage.delete(f"{position.prefix}/{MANIFEST}")
            for item in self.storage.list(f"{position.prefix}/"):
                self.storage.delete(item.key)


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(action: Callable[[], Any], world_rank: int) -> Any:
    """Run `action` on rank 0 and give its result, or raise its error, on every rank.

    Raises
    ------
    SSACLError
        The same class and text on every rank.
    """
    outcome: tuple[Any, type[SSACLError] | None, str] = (None, None, "")
    if world_rank == 0:
        try:
            outcome = (action(), None, "")
        except SSACLError as error:
            outcome = (None, type(error), str(error))
        except OSError as error:
            outcome = (None, TrainingError, f"Rank 0 failed: {error.strerror}. Mend it and run the same command again.")
    value, kind, text = gather_objects(outcome)[0]
    if kind is not None:
        raise kind(text)
    return value


def save_random_state(folder: Path, world_rank: int) -> None:
    """This rank's generators (dropout)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, folder / f"random-{world_rank}.pt")


def load_random_state(folder: Path, world_rank: int) -> None:
    """Take the generators up again; a rank that did not exist when the checkpoint was written keeps its own."""
    path = folder / f"random-{world_rank}.pt"
    if not path.exists():
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
