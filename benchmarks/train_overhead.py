"""What Ray Train and DeepSpeed ZeRO 2 add to a step, what a checkpoint costs training, and how long it waits for data.

    python -m benchmarks.train_overhead [--quick] [--save] [--storage s3|folder]

The arms take turns, a run each, every one in a process of its own: `plain` is `python -m ssacl.training` with engine.kind=torch, `ray` is
the same run as one Ray train worker with DeepSpeed ZeRO 2, `waits` is `plain` with checkpoints that training waits for. Films, metrics and
checkpoints lie in a real S3 server (rclone) that shares the machine, or in a folder. Figures are those of the runs' own metrics; a step's
time is all that passes from one step's record to the next but for validation and checkpoints. One checkpoint in 50 steps.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.loader_data import write_films
from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.config import Config, parse_config
from ssacl.data.s3_server import embedded_s3
from ssacl.data.storage import open_storage
from ssacl.errors import TrainingError
from ssacl.training.reporter import MetricsLog
from ssacl.training.resume import run_storage

logger = logging.getLogger("train_overhead")

BATCH, CYCLE, WARM_UP, IN_FLIGHT = 16, 50, 5, 10
"""Samples a step; steps between checkpoints; steps at a run's start that are left out; steps after a checkpoint, while it is uploaded."""
GOALS = {
    "ray_to_plain_step": Goal(max=1.05),
    "checkpoint_stall_share": Goal(max=0.03),
    "data_wait_share": Goal(max=0.02),
}
Steps = list[dict[str, Any]]


def measure(options: argparse.Namespace) -> Measurement:
    """All arms in turns.

    Raises
    ------
    TrainingError
        A run fails.
    StorageError
        The S3 server does not start.
    """
    rounds, num_steps = (1, 12) if options.quick else (options.rounds, CYCLE + IN_FLIGHT)
    cycle = 6 if options.quick else CYCLE
    runs: dict[str, list[Steps]] = {"plain": [], "ray": [], "waits": []}
    with tempfile.TemporaryDirectory(prefix="ssacl-overhead-") as folder, _place(options.storage, Path(folder)) as root:
        write_films(open_storage(f"{root}/films"), 512, side_px=256, num_validation=32).upload(open_storage(f"{root}/films"))
        for number in range(rounds):
            arms = ("plain", "ray") if number % 2 == 0 else ("ray", "plain")
            for arm in (*arms, "waits") if number == 0 else arms:
                config = _config(root, f"{arm}{number}", arm, num_steps, cycle)
                runs[arm].append(_run(config, Path(folder)))
                logger.info("round %d of %d: %s %.3f s a step", number + 1, rounds, arm, _step_s(runs[arm][-1]))
    return _measurement(runs, options.storage, cycle)


@contextlib.contextmanager
def _place(kind: str, folder: Path) -> Iterator[str]:
    if kind == "folder":
        yield str(folder)
        return
    with embedded_s3(folder / "s3") as server:
        os.environ.update(server.environment)
        yield "s3://ssacl"


def _config(root: str, name: str, arm: str, num_steps: int, cycle: int) -> Config:
    engine = {"kind": "deepspeed", "zero_stage": 2} if arm == "ray" else {"kind": "torch"}
    return parse_config(
        {
            "data": {"url": f"{root}/films", "lm_max_tokens": 64},
            "model": {
                "vision": {"image_size_px": 96, "patch_size_px": 8, "width": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 3}
                | {"decoder_width": 128, "decoder_depth": 2, "decoder_num_heads": 4},
                "text": {"width": 128, "depth": 2, "num_heads": 4, "ffn_width": 256},
                "language": {"width": 128, "depth": 3, "num_heads": 4, "max_positions": 512},
            },
            "engine": {**engine, "precision": "fp32", "micro_batch_size": BATCH},
            "run": {
                "name": name,
                "storage_url": f"{root}/runs",
                "stages": [{"kind": "joint", "num_steps": num_steps}],
                "checkpoint_every_steps": cycle,
                "asynchronous_checkpoints": arm != "waits",
                "validate_every_steps": 10**6,
                "log_every_steps": 1,
            },
        }
    )


def _run(config: Config, folder: Path) -> Steps:
    if config.engine.kind == "deepspeed":
        from ray_jobs.train import run_training

        metrics = run_training(config, progress=False, out_folder=folder / config.run.name).metrics
    else:
        path = folder / f"{config.run.name}.yaml"
        path.write_text(config.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "ssacl.training", "--config", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TrainingError(f"The plain run failed: {(done.stderr.splitlines() or ['no message'])[-1]} Run its command by hand.")
        metrics = MetricsLog.parse(run_storage(config).read(MetricsLog.KEY)).records
    return [record for record in metrics if record["event"] == "step"]


def _seconds(steps: Steps) -> list[float]:
    return [BATCH / record["images_per_s"] for record in steps[WARM_UP:]]


def _step_s(steps: Steps) -> float:
    return statistics.median(_seconds(steps))


def _stall_share(steps: Steps, cycle: int) -> float:
    """Time for which training stood still for the run's one checkpoint, over the steps between two."""
    return sum(record["checkpoint_stall_s"] for record in steps) / (cycle * _step_s(steps))


def _slowdown_share(steps: Steps, cycle: int) -> float:
    """What the steps while the checkpoint is uploaded take longer than the run's median, over the steps between two."""
    after = [BATCH / record["images_per_s"] for record in steps[cycle:]]
    return (sum(after) - len(after) * _step_s(steps)) / (cycle * _step_s(steps))


def _wait_share(steps: Steps) -> float:
    seconds = _seconds(steps)
    return sum(record["data_wait_share"] * s for record, s in zip(steps[WARM_UP:], seconds, strict=True)) / sum(seconds)


def _measurement(runs: dict[str, list[Steps]], storage: str, cycle: int) -> Measurement:
    ratios = [_step_s(ray) / _step_s(plain) for ray, plain in zip(runs["ray"], runs["plain"], strict=True)]
    ours = [*runs["plain"], *runs["ray"]]
    stalls = [_stall_share(steps, cycle) for steps in ours]
    waits = [_wait_share(steps) for steps in ours]
    figures = {
        "step_s": {arm: round(statistics.median(map(_step_s, many)), 4) for arm, many in runs.items()},
        "ray_to_plain_step": round(statistics.median(ratios), 4),
        "checkpoint_stall_share": round(statistics.median(stalls), 5),
        "checkpoint_stall_share_by_arm": {
            arm: round(statistics.median(_stall_share(steps, cycle) for steps in many), 5) for arm, many in runs.items()
        },
        "slower_while_uploading_share": round(statistics.median(_slowdown_share(steps, cycle) for steps in ours), 4),
        "data_wait_share": round(statistics.median(waits), 5),
    }
    spread = {
        "ray_to_plain_step": [round(min(ratios), 4), round(max(ratios), 4)],
        "checkpoint_stall_share": [round(min(stalls), 5), round(max(stalls), 5)],
        "data_wait_share": [round(min(waits), 5), round(max(waits), 5)],
    }
    config = {
        "storage": {"s3": "rclone's S3 server on this machine", "folder": "a folder"}[storage],
        "stage": "joint, float32, one thread, 96 px, batch 16",
        "steps_between_checkpoints": cycle,
        "steps_a_run": len(ours[0]),
    }
    return Measurement(figures, GOALS, config, n=len(ratios), spread=spread)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--storage", choices=("s3", "folder"), default="s3", help="where films and checkpoints lie (default s3)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arm (default 3)")


if __name__ == "__main__":
    sys.exit(run_benchmark("train_overhead", measure, add_arguments, description=__doc__))
