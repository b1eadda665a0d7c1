"""Checkpoints that are stored while training goes on: one at a time, complete or invisible, and their errors arrive by name."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.multiprocessing import ProcessExitedException
from training_set import tiny_config, tiny_tree, write_training_set

from ssacl.config import parse_config
from ssacl.data.storage import FolderStorage
from ssacl.errors import CheckpointError, StorageError
from ssacl.training.host_copies import HostCopies
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter
from ssacl.training.resume import Position, RunStore
from ssacl.training.sealed import check_folder

WAIT_S = 20


class HeldStorage(FolderStorage):
    """A folder whose uploads wait for `gate` and say so; `full` ones then fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate, self.reached, self.full = threading.Event(), threading.Event(), False

    def sub(self, prefix: str) -> "HeldStorage":
        other = HeldStorage(self.root / prefix)
        other.__dict__ |= {"gate": self.gate, "reached": self.reached, "full": self.full}
        return other

    def upload(self, key: str, path: Path) -> None:
        self.reached.set()
        assert self.gate.wait(WAIT_S)
        if self.full:
            raise StorageError("the disk or quota is full.")
        super().upload(key, path)


def _save(store: RunStore, step: int, state: torch.Tensor) -> None:
    def write(folder: Path) -> HostCopies:
        copies = HostCopies()
        copies.add({"state": state}, folder / "state.pt")
        return copies

    store.save(Position(0, step), write, {"step": step})


def _stored(store: RunStore, step: int, into: Path) -> torch.Tensor:
    return torch.load(store.fetch(Position(0, step), into) / "state.pt", weights_only=True)["state"]


def test_training_goes_on_and_the_checkpoint_is_of_the_moment_it_was_taken(tmp_path):
    store = RunStore(storage := HeldStorage(tmp_path / "run"), asynchronous=True)
    state = torch.arange(5.0)
    _save(store, 1, state)
    assert storage.reached.wait(WAIT_S)
    state += 100
    store.poll()
    assert store.positions() == []
    storage.gate.set()
    store.wait()
    assert _stored(store, 1, tmp_path / "copy").tolist() == [0, 1, 2, 3, 4]


def test_one_upload_at_a_time_and_old_checkpoints_go(tmp_path):
    store = RunStore(storage := HeldStorage(tmp_path / "run"), keep_last=2, asynchronous=True)
    storage.gate.set()
    for step in (1, 2, 3):
        _save(store, step, torch.full((3,), float(step)))
        # Saving began only when the one before was complete.
        assert store.positions()[-1:] in ([Position(0, step - 1)] if step > 1 else [], [Position(0, step)])
    store.wait()
    assert store.positions() == [Position(0, 2), Position(0, 3)]
    assert _stored(store, 3, tmp_path / "copy").tolist() == [3, 3, 3]


def _until_told(store: RunStore, how: str) -> None:
    if how == "save":
        _save(store, 3, torch.ones(3))
    elif how == "wait":
        store.wait()
    else:
        for _ in range(WAIT_S * 100):
            store.poll()
            threading.Event().wait(0.01)


@pytest.mark.parametrize("how", ["save", "poll", "wait"])
def test_an_error_arrives_by_name_and_leaves_nothing_visible(tmp_path, how):
    store = RunStore(storage := HeldStorage(tmp_path / "run"), asynchronous=True)
    storage.gate.set()
    _save(store, 1, torch.zeros(3))
    store.wait()
    storage.full = True
    _save(store, 2, torch.ones(3))
    with pytest.raises(CheckpointError, match=r"checkpoints/00-00000002 could not be stored: .*full"):
        _until_told(store, how)
    assert store.positions() == [Position(0, 1)]
    # Told once; the next one may be stored again.
    storage.full = False
    _save(store, 3, torch.ones(3))
    store.wait()
    assert store.positions() == [Position(0, 1), Position(0, 3)]


def test_a_run_that_lost_its_name_seals_nothing(tmp_path):
    def lost() -> None:
        raise StorageError("another run holds the name")

    store = RunStore(FolderStorage(tmp_path / "run"), asynchronous=True, check=lost)
    _save(store, 1, torch.zeros(3))
    with pytest.raises(StorageError, match="another run"):
        store.wait()
    assert not (tmp_path / "run").exists()


def test_ties_and_views_survive_the_copy(tmp_path):
    buffer = torch.arange(1000.0)
    tied = buffer[10:14]
    copies = HostCopies()
    copies.add({"a": tied, "b": tied, "nested": [(torch.zeros(()), "x", 3)]}, tmp_path / "new" / "state.pt")
    buffer.zero_()
    copies.write()
    read = torch.load(tmp_path / "new" / "state.pt", weights_only=True)
    assert read["a"].tolist() == [10, 11, 12, 13]
    assert read["a"].data_ptr() == read["b"].data_ptr()
    assert read["nested"] == [(torch.zeros(()), "x", 3)]
    # Not the whole buffer that the view is of.
    assert (tmp_path / "new" / "state.pt").stat().st_size < 4 * len(buffer)


def _two_ranks(world_rank: int, world_size: int, folder: str) -> None:
    storage = HeldStorage(Path(folder))
    store = RunStore(storage, world_rank, asynchronous=True)

    def write(part: Path) -> HostCopies:
        copies = HostCopies()
        copies.add(torch.full((3,), float(world_rank)), part / f"part-{world_rank}.pt")
        return copies

    store.save(Position(0, 1), write, {})
    # Training's own collectives, while the other group's wait for the slow rank.
    for _ in range(20):
        dist.all_reduce(value := torch.ones(1))
        assert value.item() == world_size
    assert store.positions() == []
    store.poll()
    dist.barrier()
    storage.gate.set()
    store.wait()
    assert store.positions() == [Position(0, 1)]
    manifest = check_folder(store.fetch(Position(0, 1), Path(folder) / f"copy{world_rank}"))
    assert set(manifest["files"]) == {"part-0.pt", "part-1.pt"}
    storage.full = world_rank == 1
    store.save(Position(0, 2), write, {})
    with pytest.raises(CheckpointError, match=r"00-00000002 could not be stored: .*full"):
        store.wait()


def test_ranks_store_their_parts_beside_training_and_fail_alike(tmp_path):
    run_ranks(_two_ranks, 2, tmp_path / "ranks", str(tmp_path / "run"))


def _killed_while_uploading(world_rank: int, world_size: int, tree: dict, step: int, num_threads: int) -> None:
    # As many as the run it is compared with: sums are rounded by how they are split.
    torch.set_num_threads(num_threads)
    upload = FolderStorage.upload

    def dying(self: FolderStorage, key: str, path: Path) -> None:
        upload(self, key, path)
        if key == "state.pt" and f"{step:08d}" in self.url:
            os.kill(os.getpid(), signal.SIGKILL)

    FolderStorage.upload = dying
    train(parse_config(tree), LogReporter(), world_rank, world_size)


def test_killed_in_the_middle_of_an_upload(tmp_path):
    """The half-stored checkpoint is invisible; the run goes on from the one before, bit for bit as a run that waits for its checkpoints."""
    data = write_training_set(tmp_path / "set")
    waits = tiny_config(data, tmp_path / "waits", run={"asynchronous_checkpoints": False})
    whole = train(waits, LogReporter())
    tree = tiny_tree(data, tmp_path / "runs")
    tree["run"]["checkpoint_every_steps"] = 2
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(_killed_while_uploading, 1, tmp_path / "ranks", tree, 4, torch.get_num_threads())
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    assert (checkpoints / "00-00000004" / "state.pt").exists()
    assert RunStore(FolderStorage(tmp_path / "runs" / "tiny")).positions() == [Position(0, 2)]
    resumed = train(parse_config(tree), LogReporter())
    steps = [[(r["stage"], r["step"], r["losses"]) for r in outcome.metrics if r["event"] == "step"] for outcome in (whole, resumed)]
    assert steps[0] == steps[1]
    assert resumed.manifest["files"]["model.safetensors"] == whole.manifest["files"]["model.safetensors"]
    stalls = [r["checkpoint_stall_s"] for r in resumed.metrics if r["event"] == "step" and r["stage"] == "contrastive"]
    assert [stall > 0 for stall in stalls] == [False, False, False, False, True, False]
    assert json.loads((checkpoints / "03-00000000" / "manifest.json").read_text())["files"]
