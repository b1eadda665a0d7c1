"""The numbers do not depend on how many ranks there are or how the optimizer is sharded, nor on a change of either half way."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_set import tiny_tree, write_training_set

from ssacl.config import parse_config
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter

NUM_STEPS = 20
KINDS = {
    "ddp": {"kind": "torch"},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
}


class StopHereError(Exception):
    """Raised in the place of a crash."""


class StopAt(LogReporter):
    """Keeps the total losses; breaks the run off after a step, 0: never."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._stop = step
        self.losses: dict[int, float] = {}

    def progress(self, record) -> None:
        if record.get("event") == "step":
            self.losses[record["step"]] = record["losses"]["total"]
            if record["step"] == self._stop:
                raise StopHereError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("set"))


def _tree(data: Path, runs: Path, global_batch_size: int, accumulation_steps: int) -> dict[str, Any]:
    tree = tiny_tree(data, runs)
    tree["model"]["text"]["dropout"] = tree["model"]["language"]["dropout"] = 0.0
    tree["optim"] |= {"lm_lr_scale": 0.25, "clip_norm": 1.0}
    tree["engine"] |= {"global_batch_size": global_batch_size, "accumulation_steps": accumulation_steps}
    tree["run"] |= {"stages": [{"kind": "joint", "num_steps": NUM_STEPS}], "checkpoint_every_steps": 2}
    return tree


def _losses(tree: dict[str, Any], stop: int, world_rank: int = 0, world_size: int = 1) -> dict[int, float]:
    reporter = StopAt(stop)
    with contextlib.suppress(StopHereError):
        train(parse_config(tree), reporter, world_rank, world_size)
    return reporter.losses


def _train_each(world_rank: int, world_size: int, tree: dict[str, Any], stop: int, out: str) -> None:
    """One run for each of `KINDS`, beside each other; rank 0 writes their losses by step."""
    runs = tree["run"]["storage_url"]
    losses = {}
    for name, engine in KINDS.items():
        one = tree | {"engine": tree["engine"] | engine, "run": tree["run"] | {"storage_url": f"{runs}-{name}"}}
        losses[name] = _losses(one, stop, world_rank, world_size)
    if world_rank == 0:
        Path(out).write_text(json.dumps(losses))


def _read(path: Path) -> dict[str, dict[int, float]]:
    return {name: {int(step): loss for step, loss in losses.items()} for name, losses in json.loads(path.read_text()).items()}


def test_ranks_and_shards_do_not_change_the_losses(data, tmp_path):
    alone = _losses(_tree(data, tmp_path / "alone", 4, 1), NUM_STEPS)
    assert list(alone) == list(range(1, NUM_STEPS + 1))
    run_ranks(_train_each, 2, tmp_path / "ranks", _tree(data, tmp_path / "runs", 4, 1), NUM_STEPS, str(tmp_path / "losses.json"))
    for name, losses in _read(tmp_path / "losses.json").items():
        assert losses == pytest.approx(alone, rel=1e-5), name


def test_a_run_goes_on_with_fewer_and_with_more_ranks(data, tmp_path):
    """2 ranks until step 3, 1 rank from its checkpoint at 2 until step 5, 2 ranks from that at 4 until step 6."""
    alone = _losses(_tree(data, tmp_path / "alone", 8, 2), 6)
    tree = _tree(data, tmp_path / "runs", 8, 2)
    for part, (world_size, stop, steps) in enumerate(((2, 3, (1, 2, 3)), (1, 5, (3, 4, 5)), (2, 6, (5, 6)))):
        out = tmp_path / f"losses{part}.json"
        run_ranks(_train_each, world_size, tmp_path / f"ranks{part}", tree, stop, str(out))
        for name, losses in _read(out).items():
            assert losses == pytest.approx({step: alone[step] for step in steps}, rel=1e-4), (name, part)
