"""A sweep of real, tiny training runs on Ray: killed in the middle, and started again; with a pruned trial, and with a lost node."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from sweep_files import write_sweep
from test_faults_ray import HEAD, QUICK

from ray_jobs.session import ray_session
from ray_jobs.tune import run_sweep
from ssacl.config import load_config
from ssacl.data.storage import open_storage
from ssacl.errors import ConfigError
from ssacl.registry.versions import version_names
from ssacl.sweeps.config import load_sweep
from ssacl.sweeps.ledger import Ledger, Trial, trial_config
from ssacl.sweeps.results import Results
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GIVE_UP_S = 200
OVERRIDES = [
    "run.stages=[{kind: contrastive, num_steps: 24}, {kind: findings, num_steps: 2}, {kind: generation, num_steps: 4}]",
    "run.checkpoint_every_steps=2",
    "run.validate_every_steps=12",
]


def write_finished(ledger: Ledger, **what: object) -> Trial:
    """What an earlier start of the command leaves of a trial that learned next to nothing."""
    last = {"step": 30, "stage": "generation", "last": True, "language_model": 99.0, "findings_f1": 0.0}
    trial = Trial.model_validate({"seed": 0, "status": "finished", "curve": [last], **what})
    ledger.write(trial)
    return trial


def step_records(run: Path) -> list[dict[str, Any]]:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in metrics if record["event"] == "step"]


def restarts(steps: list[dict[str, Any]]) -> list[int]:
    """First optimizer steps after each restart: a run that goes on counts its time anew."""
    return [after["run_step"] for before, after in itertools.pairwise(steps) if after["elapsed_s"] < before["elapsed_s"]]


@pytest.mark.timeout(300)
def test_a_pruned_trial_leaves_its_room_to_the_next(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, objectives={"mirror_agreement": "max"}, budget={"trials": 3})
    sweep = load_sweep(path, ["run.stages=[{kind: contrastive, num_steps: 10000}]"])
    ledger = Ledger(sweep)
    ledger.claim()
    ledger.storage.sub("runs/trial-0000/model").write("manifest.json", b'{"files": {}}')
    # More than any trial can reach: the others are pruned at the first rung.
    write_finished(ledger, name="trial-0000", curve=[{"step": 2, "stage": "contrastive", "last": True, "mirror_agreement": 2.0}])
    with ray_session(num_cpus=1):
        run_sweep(sweep, out_folder=tmp_path / "out")
    assert [trial.status for trial in ledger.trials()] == ["finished", "pruned", "pruned"]
    # What it was pruned for is known to the search, and to the rung when the sweep goes on.
    assert [trial.step for trial in ledger.trials()] == [2, 2, 2]


@pytest.mark.timeout(500)
def test_a_sweep_killed_in_the_middle_goes_on_where_it_stood(tmp_path: Path) -> None:
    path = write_sweep(
        tmp_path,
        space={"optim.lr": {"log_uniform": [0.001, 0.003]}},
        objectives={"language_model": "min", "findings_f1": "max"},
        budget={"trials": 2},
        stability={"seeds": 1, "num_test_films": 2, "uncertainty": False},
    )
    sweep = load_sweep(path, OVERRIDES)
    ledger = Ledger(sweep)
    ledger.claim()
    base = write_finished(ledger, name="trial-0000", point={"optim.lr": 0.001})
    base_run = write_finished(ledger, name="base-seed-1", kind="base", seed=1, test={"findings_f1": 0.0})
    runs = tmp_path / "sweeps/tiny/runs"
    command = [sys.executable, "-m", "ssacl.cli", "tune", "--config", str(path), *OVERRIDES]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log, stdout=log, cwd=Path(__file__).parents[1]) as driver:
        try:
            give_up_at = time.monotonic() + GIVE_UP_S
            while not list(runs.glob("trial-0001/checkpoints/*/manifest.json")):
                assert driver.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < give_up_at, "no checkpoint came"
                time.sleep(0.02)
        finally:
            driver.kill()
    begun = ledger.read("trial-0001")
    assert begun.status == "running"
    assert not list(runs.glob("*/model/manifest.json"))

    with ray_session(num_cpus=2):
        results = run_sweep(sweep, out_folder=tmp_path / "out")
        records = [*ledger.trials(), *ledger.trials("base", "best")]
        run_sweep(sweep, out_folder=tmp_path / "out")
        assert [*ledger.trials(), *ledger.trials("base", "best")] == records, "no trial runs twice"
        with pytest.raises(ConfigError, match="3 train workers with 1 CPU each do not fit"):
            run_sweep(load_sweep(path, [*OVERRIDES, "run.num_train_workers=3"]))
        with pytest.raises(ConfigError, match=r"started with other settings: .*optim\.weight_decay"):
            run_sweep(load_sweep(path, [*OVERRIDES, "optim.weight_decay=0.5"]))

    assert [trial.name for trial in records] == ["trial-0000", "trial-0001", "base-seed-1", "trial-0001-seed-1"]
    assert [records[0], records[2]] == [base, base_run]
    resumed = records[1]
    assert (resumed.status, resumed.point) == ("finished", begun.point)
    assert [(record["step"], record["stage"]) for record in resumed.curve] == [
        *((12, "contrastive"), (24, "contrastive")),
        *((26, "findings"), (30, "generation")),
    ]
    steps = step_records(runs / "trial-0001")
    assert [record["run_step"] for record in steps] == list(range(1, 31))
    first = restarts(steps)
    assert len(first) == 1, "it went on once"
    assert first[0] > 2, "from a checkpoint"
    assert records[3].status == "finished", records[3].error
    assert set(records[3].test) == {"findings_f1", "mirror_agreement"}
    assert not list(runs.glob("*/checkpoints/*/manifest.json"))
    assert results.table["best"] == "trial-0001"
    exported = [
        json.loads((folder / "manifest.json").read_text()) for folder in (runs / "trial-0001/model", tmp_path / "sweeps/tiny/best_model")
    ]
    assert exported[0] == exported[1]
    best = load_config(results.best_yaml)
    assert best.run.name == "tiny-best"
    assert best.optim.lr == begun.point["optim.lr"]
    assert results.page.exists()


@pytest.mark.timeout(500)
def test_a_population_killed_in_the_middle_goes_on_with_the_same_copies(tmp_path: Path) -> None:
    path = write_sweep(
        tmp_path,
        # The base's rate learns; all others are too low to.
        space={"optim.lr": {"log_uniform": [1e-7, 2e-7]}},
        objectives={"image_reconstruction": "min"},
        scheduler={"kind": "pbt", "first_rung_steps": 6, "population": 2, "redraw": 0.0},
        budget={"trials": 3},
        max_concurrent=2,
        registry_url=str(tmp_path / "registry"),
    )
    # The generation lies in the middle of a stage, and no checkpoint or validation is due there.
    overrides = ["run.stages=[{kind: contrastive, num_steps: 12}]", "run.checkpoint_every_steps=4", "run.validate_every_steps=4"]
    sweep = load_sweep(path, overrides)
    ledger = Ledger(sweep)
    runs = tmp_path / "sweeps/tiny/runs"
    command = [sys.executable, "-m", "ssacl.cli", "tune", "--config", str(path), *overrides]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log, stdout=log, cwd=Path(__file__).parents[1]) as driver:
        try:
            give_up_at = time.monotonic() + GIVE_UP_S
            while not (tmp_path / "sweeps/tiny/trials/trial-0002.json").exists():
                assert driver.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < give_up_at, (tmp_path / "log").read_text()
                time.sleep(0.02)
        finally:
            driver.kill()
    generations, copy = ledger.generations(), ledger.read("trial-0002")
    assert [fork.model_dump() for fork in generations[0].forks] == [
        {"name": "trial-0002", "parent": "trial-0000", "replaces": "trial-0001", "point": {"optim.lr": 2e-7}}
    ]
    with ray_session(num_cpus=2):
        results = run_sweep(sweep, out_folder=tmp_path / "out")
        records = ledger.trials()
        run_sweep(sweep, out_folder=tmp_path / "out")
    assert ledger.trials() == records, "no trial runs twice"
    assert ledger.generations() == generations
    assert [trial.status for trial in records] == ["finished", "pruned", "finished"]
    assert [trial.step for trial in records] == [12, 6, 12]
    assert (records[2].point, records[2].past) == (copy.point, copy.past)
    donor, copied = step_records(runs / "trial-0000"), step_records(runs / "trial-0002")
    assert [record["run_step"] for record in copied] == list(range(1, 13))
    assert copied[:6] == donor[:6], "it begins as a copy"
    assert [record["lr"] < 2.1e-7 for record in copied[1:]] == [False] * 5 + [True] * 6, "and goes on under its own settings"
    assert not list(runs.glob("*/checkpoints/*/manifest.json"))
    # Its configuration alone, as `best.yaml` holds the best's, trains the copy again.
    config = trial_config(sweep, records[2])
    torch.set_num_threads(1)
    again = train(config.model_copy(update={"run": config.run.model_copy(update={"storage_url": str(tmp_path / "again")})}), LogReporter())
    assert [record["losses"] for record in again.metrics if record["event"] == "step"] == [record["losses"] for record in copied]
    last = [record["losses"] for record in again.metrics if record["event"] == "validation"][-1]
    assert last["image_reconstruction"] == records[2].value("image_reconstruction")
    registry = open_storage(tmp_path / "registry")
    assert [f"{registry.url}@{name}" for name in version_names(registry)] == [results.table["registered"]], "registered once"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes with room for one train worker each, the first with the driver."""
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    running = Cluster(initialize_head=True, head_node_args=HEAD)
    try:
        running.add_node(num_cpus=1)
        with ray_session(address=running.address):
            yield running
    finally:
        running.shutdown()


def held_by(run: Path) -> psutil.Process | None:
    """The train worker of a run that has a checkpoint."""
    try:
        holder = json.loads((run / "run.lock").read_text())
    except FileNotFoundError:
        return None
    number = int(holder["process"].rpartition(" ")[2].partition("@")[0])
    return psutil.Process(number) if list(run.glob("checkpoints/*/manifest.json")) else None


@pytest.mark.timeout(500)
def test_two_trials_run_at_once_and_that_of_a_lost_node_goes_on_elsewhere(tmp_path: Path, cluster: Cluster) -> None:
    path = write_sweep(tmp_path, objectives={"mirror_agreement": "max"}, budget={"trials": 2}, scheduler={"kind": "none"}, max_concurrent=2)
    sweep = load_sweep(path, ["run.stages=[{kind: contrastive, num_steps: 60}]", "run.validate_every_steps=60", "run.max_restarts=10"])
    runs = [tmp_path / f"sweeps/tiny/runs/trial-000{number}" for number in (0, 1)]
    ended: Future[Results] = Future()

    def work() -> None:
        try:
            ended.set_result(run_sweep(sweep, out_folder=tmp_path / "out"))
        except BaseException as error:
            ended.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        held: dict[Path, psutil.Process] = {}
        give_up_at = time.monotonic() + GIVE_UP_S
        # Each waits for the other, so that both are in the middle when the node is lost.
        while len(held) < 2:
            assert not ended.done(), ended.exception()
            assert time.monotonic() < give_up_at, f"{len(held)} trials have a checkpoint"
            for run in runs:
                if run not in held and (process := held_by(run)) is not None:
                    process.suspend()
                    held[run] = process
            time.sleep(0.02)
        lost = next(iter(cluster.worker_nodes))
        there = psutil.Process(lost.all_processes["raylet"][0].process.pid).children(recursive=True)
        [moved] = [run for run, process in held.items() if process in there]
        # As when the power fails: all processes of the node at once.
        for process in there:
            process.kill()
        cluster.remove_node(lost, allow_graceful=False)
        next(process for run, process in held.items() if run != moved).resume()
        results = ended.result(timeout=GIVE_UP_S)
    except BaseException:
        # A test that fails does not wait for its sweep.
        ray.shutdown()
        thread.join(timeout=30)
        raise
    assert results.table["num_trials"] == {"finished": 2, "pruned": 0, "failed": 0, "running": 0}
    for run in runs:
        steps = step_records(run)
        assert [record["run_step"] for record in steps] == list(range(1, 61))
        assert len(restarts(steps)) == (run == moved), "only the lost node's trial was started again, from a checkpoint"
