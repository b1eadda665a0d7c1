"""Ray Train on several raylets of this machine: nodes, train workers and the controller fail, and the numbers do not change."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from training_set import tiny_tree, write_training_set

from ray_jobs.session import ray_session
from ray_jobs.train import TrainingResult, run_training
from ssacl.config import Config, parse_config
from ssacl.errors import ConfigError, TrainingError
from ssacl.training.loop import TrainingOutcome, train
from ssacl.training.reporter import LogReporter

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

NUM_STEPS = 24
GIVE_UP_S = 400
"""For a machine with much else to do."""
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}
"""Ray's limits, for large clusters, made seconds; and none of its actors that these runs do without."""
SYSTEM = {
    # A lost node is noticed, and a stopped process ended, within seconds.
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "kill_worker_timeout_milliseconds": 500,
    # Ray's 15 lets anything else on the machine go first, and its 1 on a node with one CPU starts processes one after the other.
    "worker_niceness": 0,
    "worker_maximum_startup_concurrency": 2,
}
HEAD = {
    "num_cpus": 1,
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
    "_system_config": SYSTEM,
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as environment:
        for name, value in QUICK.items():
            environment.setenv(name, value)
        # Each process of Ray would compile all of Ray again.
        environment.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        running = Cluster(initialize_head=True, head_node_args=HEAD)
        try:
            yield running
        finally:
            running.shutdown()


@pytest.fixture
def cluster(nodes: Cluster) -> Iterator[Cluster]:
    """Two nodes with room for one train worker each, the first with the driver, whatever the test before has left."""
    while len(nodes.worker_nodes) < 1:
        nodes.add_node(num_cpus=1)
    with ray_session(address=nodes.address):
        yield nodes


@dataclass
class Place:
    """Where the runs of these tests lie, and what a run left alone in one process gives."""

    folder: Path
    alone: TrainingOutcome

    def config(self, name: str, engine: dict[str, Any] | None = None, **run: Any) -> Config:
        return parse_config(_tree(self.folder, name, engine or {}, run))

    def manifests(self, name: str) -> list[dict[str, Any]]:
        """Of the checkpoints, oldest first."""
        return [json.loads(path.read_text()) for path in sorted((self.folder / name).glob("checkpoints/*/manifest.json"))]


def _tree(folder: Path, name: str, engine: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    tree = tiny_tree(folder / "set", folder)
    tree["model"]["text"]["dropout"] = tree["model"]["language"]["dropout"] = 0.0
    tree["engine"] |= {"global_batch_size": 4} | engine
    stages = [{"kind": "joint", "num_steps": NUM_STEPS}]
    tree["run"] |= {"name": name, "stages": stages, "checkpoint_every_steps": 2, "keep_last": 100, "max_restarts": 10} | run
    return tree


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("faults")
    write_training_set(folder / "set")
    return Place(folder, train(parse_config(_tree(folder, "alone", {}, {})), LogReporter()))


@dataclass
class Running:
    """A run in a thread of its own, for Ray starts nodes from the main thread only."""

    result: Future[TrainingResult]

    def wait_for(self, what: str, happens: Callable[[], Any]) -> Any:
        give_up_at = time.monotonic() + GIVE_UP_S
        while not (found := happens()):
            assert not self.result.done(), f"the run ended before {what}: {self.result.exception()}"
            assert time.monotonic() < give_up_at, f"waited {GIVE_UP_S} s for {what}"
            time.sleep(0.05)
        return found


def run_while(place: Place, config: Config, happens: Callable[[Running], None]) -> None:
    """Train while `happens` does its worst: every optimizer step is counted once, and its losses are those of the run left alone."""
    future: Future[TrainingResult] = Future()

    def run() -> None:
        try:
            future.set_result(run_training(config, progress=False, out_folder=place.folder / "out"))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        happens(Running(future))
        result = future.result(timeout=GIVE_UP_S)
    except BaseException:
        # A test that fails does not wait for its run: with the session all of the run's actors end, the stopped ones too.
        ray.shutdown()
        thread.join(timeout=30)
        raise
    ran, alone = ([(r["step"], r["losses"]) for r in metrics if r["event"] == "step"] for metrics in (result.metrics, place.alone.metrics))
    assert [step for step, _ in ran] == list(range(1, NUM_STEPS + 1))
    for (step, losses), (_, expected) in zip(ran, alone, strict=True):
        assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6), step
    ends = {name: place.manifests(name)[-1]["loader"] for name in (config.run.name, "alone")}
    assert ends[config.run.name] == ends["alone"], "as many samples were taken"


def actors(name: str) -> list[psutil.Process]:
    """Processes of this test's raylets that run actors of a class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_worker_a_node_and_the_controller_are_lost_and_a_node_comes(cluster: Cluster, place: Place) -> None:
    """Faults in one run, each after a checkpoint of the group that took up the one before. A hung worker: test_hang_ray.py."""
    config = place.config("faults", {"kind": "torch"}, num_train_workers=[1, 2], resize_check_s=1.0)
    past: set[int] = set()

    def sizes() -> list[int]:
        return [manifest["world_size"] for manifest in place.manifests("faults")]

    def next_group(run: Running, size: int) -> list[psutil.Process]:
        known = len(sizes())

        def stored() -> list[psutil.Process]:
            """The train workers, all of them new ones, once they have a checkpoint."""
            found = actors("RayTrainWorker") if sizes()[known:][-1:] == [size] else []
            return found if len(found) == size and past.isdisjoint(process.pid for process in found) else []

        found: list[psutil.Process] = run.wait_for(f"a checkpoint of {size} new train workers after {len(past)} others", stored)
        past.update(process.pid for process in found)
        return found

    def break_things(run: Running) -> None:
        next_group(run, 2)[-1].kill()
        next_group(run, 2)
        lost = next(iter(cluster.worker_nodes))
        # As when the power fails: all processes of the node at once.
        for process in psutil.Process(lost.all_processes["raylet"][0].process.pid).children(recursive=True):
            process.kill()
        cluster.remove_node(lost, allow_graceful=False)
        [worker] = next_group(run, 1)
        # So that the run does not end while the news spreads.
        worker.suspend()
        [controller] = actors("TrainController")
        controller.kill()
        [worker] = next_group(run, 1)
        # Nor before the node has come.
        worker.suspend()
        cluster.add_node(num_cpus=1)
        next_group(run, 2)

    run_while(place, config, break_things)
    assert [size for size, before in zip(sizes(), [0, *sizes()], strict=False) if size != before] == [2, 1, 2]


def test_an_error_of_a_train_worker_arrives_by_its_name(cluster: Cluster, place: Place) -> None:
    tree = _tree(place.folder, "nan", {"kind": "torch"}, {})
    tree["optim"] |= {"lr": 1e30, "clip_norm": 0.0, "warmup_share": 0.0}
    with pytest.raises(TrainingError, match="Not finite at step"):
        run_training(parse_config(tree), progress=False)


def test_more_train_workers_than_fit_are_told_at_once(cluster: Cluster, place: Place) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"4 train workers with 1 CPU each do not fit.* room for 2\. Lower run\.num_train_workers"):
        run_training(place.config("many", num_train_workers=4), progress=False)
    # Enough in all, but not on one node.
    with pytest.raises(ConfigError, match=r"1 train workers with 2 CPU each .*2 nodes have 2 CPU, room for 0"):
        run_training(place.config("wide", cpus_per_train_worker=2.0), progress=False)
    with pytest.raises(ConfigError, match=r"1 CPU and 1 GPU each .* room for 0"):
        run_training(place.config("gpu", use_gpu=True), progress=False)
    assert time.monotonic() - started < 10
