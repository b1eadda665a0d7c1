"""A run killed at random steps (SIGKILL, no chance to tidy up) and started again is, bit for bit, the run that was left alone."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from ranks import run_ranks
from torch.multiprocessing import ProcessExitedException
from training_set import tiny_tree, write_training_set

from ssacl.config import parse_config
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter

STAGES = (("contrastive", 6), ("generation", 4), ("findings", 4))
STEPS = [(kind, step) for kind, count in STAGES for step in range(1, count + 1)]
NUM_KILLS = 5


class KillAt(LogReporter):
    """Kills its process after a step of a stage."""

    def __init__(self, place: tuple[str, int] | None) -> None:
        super().__init__()
        self._place = place

    def progress(self, record) -> None:
        if (record.get("stage"), record.get("step")) == self._place and record["event"] == "step":
            os.kill(os.getpid(), signal.SIGKILL)


def _train(world_rank: int, world_size: int, tree: dict, place: tuple[str, int] | None, out: str) -> None:
    outcome = train(parse_config(tree), KillAt(place), world_rank, world_size)
    steps = [(r["stage"], r["step"], r["losses"], r["gradient_norm"]) for r in outcome.metrics if r["event"] == "step"]
    Path(out).write_text(json.dumps({"steps": steps, "model": outcome.manifest["files"]["model.safetensors"]}))


def test_five_kills_at_random_steps_change_no_bit(tmp_path):
    data = write_training_set(tmp_path / "set")
    run_ranks(_train, 1, tmp_path / "whole", tiny_tree(data, tmp_path / "whole_runs"), None, str(tmp_path / "whole.json"))
    chosen = sorted(np.random.default_rng(7).choice(len(STEPS), NUM_KILLS, replace=False).tolist())
    tree = tiny_tree(data, tmp_path / "runs")
    for number, index in enumerate(chosen):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            run_ranks(_train, 1, tmp_path / f"ranks{number}", tree, STEPS[index], str(tmp_path / "killed.json"))
    assert not (tmp_path / "killed.json").exists()
    run_ranks(_train, 1, tmp_path / "last", tree, None, str(tmp_path / "killed.json"))
    whole, killed = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "killed.json"))
    # The losses are those of each step's samples, masks and dropout: their order has not changed either.
    assert [tuple(step[:2]) for step in whole["steps"]] == STEPS
    assert killed == whole
