"""What the scaling model is calibrated on: a small model's steps on one and two gloo ranks of this machine, and the rate of an all-reduce.

Two processes on one machine also share its cores and memory: `beside` are two that train without knowing of each other. What `together`
takes longer than `beside` is communication.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.scaling_model import Workload
from benchmarks.train_step import build, configuration, random_batch
from ssacl.config import Config
from ssacl.training.engine import make_engine
from ssacl.training.stages import plan_stages

ROWS, ACCUMULATION, ZERO_STAGE = 2, 2, 2
SIZES_BYTES = (1 << 12, 1 << 20, 1 << 24)


def small_config() -> Config:
    """The model of `benchmarks.train_step --preset small`, as one joint stage under ZeRO 2."""
    config = configuration("small", "paper")
    engine = config.engine.model_copy(
        update={"precision": "fp32", "zero_stage": ZERO_STAGE, "micro_batch_size": ROWS, "accumulation_steps": ACCUMULATION}
    )
    stage = config.run.stages[0].model_copy(update={"kind": "joint", "num_steps": 1000, "num_epochs": 0})
    return config.model_copy(update={"engine": engine, "run": config.run.model_copy(update={"stages": (stage,)})})


def measured(num_steps: int) -> dict[str, Any]:
    """Seconds of a step `alone`, `beside` another process and `together` with one, rates of all-reduces, and the `Workload`."""
    found: dict[str, Any] = {}
    for name, num_processes, joined in (("alone", 1, False), ("beside", 2, False), ("together", 2, True)):
        found[name] = _run(num_processes, joined, num_steps)
    return found


def _run(num_processes: int, joined: bool, num_steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ssacl-scaling-") as folder:
        barrier = multiprocessing.get_context("spawn").Barrier(num_processes)
        multiprocessing.start_processes(
            _process, (num_processes, joined, num_steps, folder, barrier), nprocs=num_processes, start_method="spawn"
        )
        parts = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    # A step is done when the slower process is.
    steps = [max(values) for values in zip(*(part["steps_s"] for part in parts), strict=True)]
    return {**parts[0], "steps_s": steps, "step_s": statistics.median(steps)}


def _process(number: int, num_processes: int, joined: bool, num_steps: int, folder: str, barrier: Any) -> None:
    os.environ["LOCAL_RANK"] = str(number if joined else 0)
    torch.set_num_threads(1)
    store = Path(folder) / ("store" if joined else f"store{number}")
    rank, world_size = (number, num_processes) if joined else (0, 1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size)
    try:
        found: dict[str, Any] = {"all_reduce_s": {size: _all_reduce_s(size) for size in SIZES_BYTES}} if joined else {}
        found |= _steps(num_steps, barrier.wait)
        (Path(folder) / f"{number}.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def _all_reduce_s(num_bytes: int, tries: int = 7) -> float:
    value = torch.ones(num_bytes // 4)
    seconds = []
    for _ in range(tries + 2):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(value)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def _steps(num_steps: int, ready: Callable[[], Any]) -> dict[str, Any]:
    config, device = small_config(), torch.device("cpu")
    model: Any = build(config, "paper", device)
    batches = [random_batch(config, ROWS, device)] * ACCUMULATION
    engine = make_engine(model, config, plan_stages(config, 1000)[0])
    with closing(engine):
        engine.step(batches, 1.0)
        ready()
        seconds = []
        for _ in range(num_steps):
            started = time.perf_counter()
            engine.step(batches, 1.0)
            seconds.append(time.perf_counter() - started)
        return {"steps_s": seconds, "num_parameters": sum(p.numel() for p in model.parameters()), "num_trained": engine.num_trained}


def measured_workload(found: dict[str, Any]) -> Workload:
    """The small model as the formulae see it; its operations are not needed, as its time alone is known."""
    model = small_config().model
    return Workload(
        preset="train_step small",
        stage="joint",
        num_parameters=found["alone"]["num_parameters"],
        num_used=found["alone"]["num_parameters"],
        num_trained=found["alone"]["num_trained"],
        zero_stage=ZERO_STAGE,
        micro_batch_size=ROWS,
        accumulation_steps=ACCUMULATION,
        flops_per_image=0.0,
        activation_bytes_per_image=0.0,
        leaf_width=model.vision.width,
        text_width=model.text.width,
        grounds=False,
    )
