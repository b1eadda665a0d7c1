"""A cluster of several raylets on this machine loses a node while training and gets one back: the numbers are those of one process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from training_set import tiny_tree, write_training_set

from ray_jobs.session import ray_session
from ray_jobs.train import run_training
from ssacl.config import parse_config
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter

NUM_STEPS = 60
GIVE_UP_S = 120
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
}
"""Ray's limits, for minutes of a large cluster's time, made seconds."""
NODE_LOST = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": NODE_LOST})
    try:
        with ray_session(address=running.address):
            yield running
    finally:
        running.shutdown()


def elastic_tree(data: Path, runs: Path, engine: dict[str, Any]) -> dict[str, Any]:
    tree = tiny_tree(data, runs)
    tree["model"]["text"]["dropout"] = tree["model"]["language"]["dropout"] = 0.0
    tree["engine"] |= {"global_batch_size": 4, **engine}
    tree["run"] |= {"stages": [{"kind": "joint", "num_steps": NUM_STEPS}], "checkpoint_every_steps": 5, "keep_last": 100}
    tree["run"] |= {"num_train_workers": [1, 2], "resize_check_s": 1.0}
    return tree


def manifests(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("checkpoints/*/manifest.json"))]


def wait_for(what: str, happens: Callable[[], Any]) -> Any:
    give_up_at = time.monotonic() + GIVE_UP_S
    while not (found := happens()):
        assert time.monotonic() < give_up_at, f"waited {GIVE_UP_S} s for {what}"
        time.sleep(0.05)
    return found


def train_workers(of: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in of.children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def lose_and_regain(cluster: Cluster, run: Path) -> None:
    """The power of one node fails; later another node comes."""
    lost = next(iter(cluster.worker_nodes))
    raylet = psutil.Process(lost.all_processes["raylet"][0].process.pid)
    wait_for("a checkpoint of 2 train workers", lambda: manifests(run))
    for process in raylet.children(recursive=True):
        process.kill()
    cluster.remove_node(lost, allow_graceful=False)
    wait_for("a checkpoint of 1 train worker", lambda: manifests(run)[-1]["world_size"] == 1)
    # So that the run does not end before the node has come.
    left = train_workers(psutil.Process())
    for process in left:
        os.kill(process.pid, signal.SIGSTOP)
    cluster.add_node(num_cpus=1)
    wait_for("a checkpoint of 2 train workers again", lambda: manifests(run)[-1]["world_size"] == 2)
    assert left


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_is_lost_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    data = write_training_set(tmp_path / "set")
    alone = train(parse_config(elastic_tree(data, tmp_path / "alone", {"kind": "torch"})), LogReporter())
    cluster.add_node(num_cpus=1)
    run = tmp_path / "runs" / "tiny"
    config = parse_config(elastic_tree(data, tmp_path / "runs", {"kind": "deepspeed", "zero_stage": 2}))
    with ThreadPoolExecutor(1) as pool:
        happened = pool.submit(lose_and_regain, cluster, run)
        result = run_training(config, progress=True, out_folder=tmp_path / "out")
        happened.result()
    sizes = [manifest["world_size"] for manifest in manifests(run)]
    assert [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before] == [2, 1, 2, 1][: len(set(sizes)) + 1]
    steps, expected = ({r["step"]: r["losses"] for r in metrics if r["event"] == "step"} for metrics in (result.metrics, alone.metrics))
    assert [r["step"] for r in result.metrics if r["event"] == "step"] == list(range(1, NUM_STEPS + 1))
    for step, losses in steps.items():
        assert losses == pytest.approx(expected[step], rel=1e-4, abs=1e-6), step
    whole = {m["loader"]["samples_consumed"] for m in manifests(tmp_path / "alone" / "tiny")[-1:]}
    assert {m["loader"]["samples_consumed"] for m in manifests(run)[-1:]} == whole
