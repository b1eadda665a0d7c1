"""A sweep of real, tiny training runs on Ray: killed in the middle, and started again."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweep_files import write_sweep

from ray_jobs.session import ray_session
from ray_jobs.tune import run_sweep
from ssacl.config import load_config
from ssacl.errors import ConfigError
from ssacl.sweeps.config import load_sweep
from ssacl.sweeps.ledger import Ledger

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GIVE_UP_S = 200
RUN = {"num_steps": 60, "every": 2}
OVERRIDES = [
    f"run.stages=[{{kind: joint, num_steps: {RUN['num_steps']}}}]",
    "optim.lr=1.0e-7",
    "run.checkpoint_every_steps=2",
    "run.validate_every_steps=20",
]


@pytest.mark.timeout(500)
def test_a_sweep_killed_in_the_middle_goes_on_where_it_stood(tmp_path: Path) -> None:
    # The base learns next to nothing, so the other trial is the best.
    path = write_sweep(
        tmp_path,
        space={"optim.lr": {"log_uniform": [0.001, 0.003]}},
        objectives={"language_model": "min", "findings_f1": "max"},
        scheduler={"kind": "none"},
        budget={"trials": 2},
        max_concurrent=2,
        stability={"seeds": 1, "num_test_films": 2},
    )
    sweep = load_sweep(path, OVERRIDES)
    ledger = Ledger(sweep)
    runs = tmp_path / "sweeps/tiny/runs"
    command = [sys.executable, "-m", "ssacl.cli", "tune", "--config", str(path), *OVERRIDES]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log, stdout=log, cwd=Path(__file__).parents[1]) as driver:
        give_up_at = time.monotonic() + GIVE_UP_S
        while not list(runs.glob("*/checkpoints/*/manifest.json")):
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < give_up_at, "no checkpoint came"
            time.sleep(0.02)
        os.kill(driver.pid, signal.SIGKILL)
    begun = [trial.name for trial in ledger.trials()]
    assert all(trial.status == "running" for trial in ledger.trials())
    assert not list(runs.glob("*/model/manifest.json"))

    with ray_session(num_cpus=2):
        results = run_sweep(sweep, out_folder=tmp_path / "out")
        records = {trial.name: trial for trial in ledger.trials()}
        run_sweep(sweep, out_folder=tmp_path / "out")
        assert {trial.name: trial for trial in ledger.trials()} == records, "no trial runs twice"
        with pytest.raises(ConfigError, match="3 train workers with 1 CPU each do not fit"):
            run_sweep(load_sweep(path, [*OVERRIDES, "run.num_train_workers=3"]))
        with pytest.raises(ConfigError, match=r"started with other settings: .*optim\.weight_decay"):
            run_sweep(load_sweep(path, [*OVERRIDES, "optim.weight_decay=0.5"]))

    trials = ledger.trials()
    assert [trial.name for trial in trials] == ["trial-0000", "trial-0001"]
    assert set(begun) <= {trial.name for trial in trials}
    resumed = []
    for trial in trials:
        assert trial.status == "finished"
        assert [record["step"] for record in trial.curve] == [20, 40, 60]
        metrics = [json.loads(line) for line in (runs / trial.name / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in metrics if record["event"] == "step"]
        assert [record["step"] for record in steps] == list(range(1, RUN["num_steps"] + 1))
        # A run that goes on counts its time anew.
        resumed += [b["step"] for a, b in itertools.pairwise(steps) if b["elapsed_s"] < a["elapsed_s"]]
    assert resumed, "the trial that had a checkpoint began anew"
    assert min(resumed) > 2
    assert results.table["best"] == "trial-0001"
    assert [trial.name for trial in ledger.trials("base", "best")] == ["base-seed-1", "trial-0001-seed-1"]
    assert all(trial.status == "finished" and trial.test for trial in ledger.trials("base", "best"))
    assert not list(runs.glob("*/checkpoints/*/manifest.json"))
    assert load_config(results.best_yaml).run.name == "tiny-best"
    assert results.page.exists()
