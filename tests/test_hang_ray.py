"""A train worker that hangs under Ray Train: the group starts again by itself and ends as if nothing had been."""

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest
from training_set import tiny_config, write_training_set

from ray_jobs.train import run_training


def stop_a_worker(metrics: Path, stopped: list[int], over: threading.Event) -> None:
    """Once there is a checkpoint, stop (not end) one train worker of this process' Ray, as a machine does that swaps or hangs."""
    while not metrics.exists():
        if over.wait(0.05):
            return
    alive = [process for process in psutil.Process().children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE]
    workers = [process for process in alive if "RayTrainWorker" in " ".join(process.cmdline())]
    if workers:
        os.kill(workers[-1].pid, signal.SIGSTOP)
        stopped.append(workers[-1].pid)


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    data = write_training_set(tmp_path / "set")
    run = {"stages": [{"kind": "findings", "num_steps": 400}], "num_train_workers": 2, "checkpoint_every_steps": 20, "max_restarts": 1}
    config = tiny_config(data, tmp_path / "runs", engine={"kind": "torch", "micro_batch_size": 2}, run=run | {"hang_limit_s": 12.0})
    stopped: list[int] = []
    over = threading.Event()
    thread = threading.Thread(target=stop_a_worker, args=(tmp_path / "runs" / "tiny" / "metrics.jsonl", stopped, over))
    thread.start()
    try:
        result = run_training(config, progress=False, out_folder=tmp_path / "out")
    finally:
        over.set()
        thread.join()
        for pid in stopped:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
    assert stopped
    assert [r["step"] for r in result.metrics if r["event"] == "step"] == list(range(1, 401))
