"""Where a run stands: its checkpoints in storage, each complete or invisible, and the state of random numbers.

<run.storage_url>/<run.name>/
    checkpoints/SS-KKKKKKKK/   stage SS (0-based) after KKKKKKKK optimizer steps; manifest.json last
    model/                     the exported model folder, when the run is finished
    metrics.jsonl, training.png, tensorboard/, samples/
    run.lock                   while a run of this name is alive
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ssacl.config import Config
from ssacl.data.storage import Storage, open_storage
from ssacl.distributed import world_size
from ssacl.errors import CheckpointError, SSACLError, TrainingError
from ssacl.training.background import Background
from ssacl.training.checkpoint import config_differences
from ssacl.training.host_copies import HostCopies
from ssacl.training.sealed import MANIFEST, download_folder, folder_hashes, parse_manifest, seal
from ssacl.training.settings import run_settings

logger = logging.getLogger(__name__)

LEAVE_S = 120.0
"""Longest time that a run which ends by an error waits for its last checkpoint: one more than storage is tried for."""
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
    """The checkpoints of one run. `latest`, `save`, `poll`, `wait` and `fetch` are called by all ranks together.

    Parameters
    ----------
    keep_last : checkpoints that stay when another is complete.
    asynchronous : `save` gives back as soon as the state is copied; a thread on each rank stores it, one checkpoint at a time.
    check : raises where this run may write no more; called on rank 0 before a checkpoint is uploaded, and again before it is sealed.
    """

    def __init__(
        self,
        storage: Storage,
        world_rank: int = 0,
        keep_last: int = 2,
        asynchronous: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.storage, self._world_rank, self._keep_last = storage, world_rank, keep_last
        self._asynchronous, self._check = asynchronous, check
        self._upload: Background | None = None
        run = hashlib.sha256(storage.url.encode()).hexdigest()[:12]
        self._staging = f"ssacl-checkpoint-{run}-{world_rank}-"
        self._swept = False
        # Of its own, as its collectives run beside those of training; gloo, as they carry objects.
        self._group = dist.new_group(backend="gloo") if asynchronous and world_size() > 1 else None

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

    def save(
        self,
        position: Position,
        write: Callable[[Path], HostCopies | None],
        entries: Mapping[str, Any],
        before_seal: Callable[[], None] = lambda: None,
    ) -> None:
        """Take every rank's part of the state, store the parts, then the manifest; older checkpoints are dropped.

        Parameters
        ----------
        write : puts this rank's part into the folder that it is given, or gives back copies that are still to be written there.
        before_seal : what rank 0 has to store before the checkpoint is visible.

        Raises
        ------
        SSACLError
            A rank could not write or upload; raised on every rank. Asynchronous: the last checkpoint's error, from here, `poll` or `wait`.
        """
        self.wait()
        folder, failure, copies = self._new_folder(), "", None
        try:
            copies = write(folder)
        # Whatever it is: the other ranks wait for an answer. PyTorch's writer raises a RuntimeError on a full disk.
        except Exception as error:
            failure = _reason(error)

        def store() -> None:
            try:
                self._store(position, folder, copies, failure, entries, before_seal)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        if self._asynchronous:
            self._upload = Background(store)
        else:
            store()

    def poll(self) -> None:
        """Raise the error of an upload that has ended; costs a small gather while one is in flight, else nothing."""
        if self._upload is not None and all(gather_objects(self._upload.done)):
            self.wait()

    def wait(self) -> None:
        """Let the upload in flight end; raises its error."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def close(self) -> None:
        """Where a run ends by an error, let its last checkpoint be stored all the same; what goes wrong with that is only logged."""
        upload, self._upload = self._upload, None
        try:
            if upload is not None:
                upload.result(LEAVE_S)
        except (SSACLError, TimeoutError) as error:
            logger.warning("the last checkpoint: %s", error)

    def _new_folder(self) -> Path:
        if not self._swept:
            # What a killed process of this run left here.
            for left in Path(tempfile.gettempdir()).glob(f"{self._staging}*"):
                shutil.rmtree(left, ignore_errors=True)
            self._swept = True
        return Path(tempfile.mkdtemp(prefix=self._staging))

    def _store(
        self,
        position: Position,
        folder: Path,
        copies: HostCopies | None,
        failure: str,
        entries: Mapping[str, Any],
        before_seal: Callable[[], None],
    ) -> None:
        on_rank_0(self._check, self._world_rank, self._group)
        target, hashes = self.storage.sub(position.prefix), {}
        try:
            if copies is not None:
                copies.write()
            hashes = folder_hashes(folder)
            for name in hashes if not failure else ():
                target.upload(name, folder / name)
        except Exception as error:
            failure = failure or _reason(error)
        parts = gather_objects((failure, hashes), self._group)
        failures = [text for text, _ in parts if text]
        if failures:
            raise CheckpointError(f"The checkpoint {position.prefix} could not be stored: {failures[0]} Earlier checkpoints are untouched.")
        merged = {name: digest for _, part in parts for name, digest in part.items()}

        def commit() -> None:
            before_seal()
            seal(folder, entries, merged)
            self._check()
            target.upload(MANIFEST, folder / MANIFEST)
            self.prune(self._keep_last)

        on_rank_0(commit, self._world_rank, self._group)

    def fetch(self, position: Position, into: Path) -> Path:
        """Download and verify a checkpoint, on every rank."""
        return download_folder(self.storage, position.prefix, into)

    def prune(self, keep_last: int) -> None:
        """Drop all but the newest `keep_last` checkpoints; the manifest goes first, so that none is ever half there."""
        for position in self.positions()[:-keep_last]:
            self.storage.delete(f"{position.prefix}/{MANIFEST}")
            for item in self.storage.list(f"{position.prefix}/"):
                self.storage.delete(item.key)


def check_same_run(manifest: Mapping[str, Any], config: Config, done: int, tokenizer_fingerprint: str) -> None:
    """Whether a run of `config` would have written this checkpoint after `done` optimizer steps; what it changes later is free.

    Raises
    ------
    CheckpointError
        Settings or tokenizer differ; the settings are named.
    """
    differences = config_differences(manifest["settings"], run_settings(config, done))
    if differences:
        raise CheckpointError(
            f"The run '{config.run.name}' was started with other settings: {'; '.join(differences)}. "
            "Take them back, or choose another run.name."
        )
    if manifest["tokenizer_fingerprint"] != tokenizer_fingerprint:
        raise CheckpointError(f"The run '{config.run.name}' was started with another tokenizer. Restore it, or choose another run.name.")


def _reason(error: Exception) -> str:
    if isinstance(error, SSACLError):
        return str(error)
    logger.info("a part of a checkpoint could not be written", exc_info=error)
    said = error.strerror if isinstance(error, OSError) else None
    return f"{said or type(error).__name__}. Free space in {tempfile.gettempdir()}, or set TMPDIR to another place."


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """`value` of every rank, in rank order; `group` is another group of all ranks than training's."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


def on_rank_0(action: Callable[[], Any], world_rank: int, group: dist.ProcessGroup | None = None) -> Any:
    """Run `action` on rank 0 and give its result, or raise its error, on every rank (of `group`, as in `gather_objects`).

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
    value, kind, text = gather_objects(outcome, group)[0]
    if kind is not None:
        raise kind(text)
    return value


def random_path(folder: Path, world_rank: int) -> Path:
    """Where a checkpoint keeps a rank's `random_state`."""
    return folder / f"random-{world_rank}.pt"


def random_state() -> dict[str, Tensor]:
    """This rank's generators (dropout)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_random_state(folder: Path, world_rank: int) -> None:
    """Take the generators up again; a rank that did not exist when the checkpoint was written keeps its own."""
    path = random_path(folder, world_rank)
    if not path.exists():
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
