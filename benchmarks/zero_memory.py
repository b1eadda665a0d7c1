"""Memory of one rank by ZeRO stage, measured on two ranks of this machine's CPU (gloo) and held against the formula of the dry run.

    python -m benchmarks.zero_memory            # then a language model of 350 million numbers under ZeRO 3
    python -m benchmarks.zero_memory --quick    # the stages alone

Each stage runs in two processes of its own: bytes of the tensors that the engine holds after a backward pass, by kind, and the largest
resident memory above what the process had before the model was built. Float32, a joint step on one film of 48 px and a short report.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from benchmarks.parity import Vocabulary
from benchmarks.record import Goal, Measurement, run_benchmark
from benchmarks.train_step import random_batch, text_tokenizer
from ssacl.config import Config, parse_config
from ssacl.models.divided import full_size
from ssacl.models.ssacl import SSACL
from ssacl.training.deepspeed_engine import DeepSpeedEngine, construction
from ssacl.training.engine import make_engine
from ssacl.training.footprint import rank_memory
from ssacl.training.memory import set_freed_memory
from ssacl.training.stages import plan_stages

logger = logging.getLogger("zero_memory")

NUM_RANKS, NUM_STEPS, ROWS = 2, 2, 2
PRELOADED = ["ssacl.training.loop", "deepspeed", "transformers.models.gpt2.modeling_gpt2", "benchmarks.train_step"]
LANGUAGE: dict[str, dict[str, int]] = {
    "small": {"width": 512, "depth": 6, "num_heads": 8, "vocab_size": 8000, "max_positions": 256},
    # GPT-2 medium's shape.
    "350M": {"width": 1024, "depth": 24, "num_heads": 16, "vocab_size": 50257, "max_positions": 1024},
}
TOLERANCE = 0.1
"""Share by which tensors held may differ from the formula: padding, scalars, and what DeepSpeed keeps besides."""


def configuration(size: str, zero_stage: int) -> Config:
    """A small model but for its language model."""
    small = {"width": 192, "depth": 4, "num_heads": 3}
    vision = small | {"image_size_px": 48, "patch_size_px": 8, "decoder_width": 192, "decoder_depth": 2, "decoder_num_heads": 3}
    text = {"width": 96, "depth": 2, "num_heads": 3, "ffn_width": 384, "vocab_size": 2000, "dropout": 0.0}
    return parse_config(
        {
            "data": {"lm_max_tokens": 16},
            "model": {"vision": vision, "text": text, "language": LANGUAGE[size] | {"dropout": 0.0}},
            "losses": {"grounding": {"enabled": False}},
            "engine": {"kind": "deepspeed", "zero_stage": zero_stage, "precision": "fp32", "micro_batch_size": ROWS},
            "run": {"stages": [{"kind": "joint", "num_steps": 10}]},
        }
    )


def resident(name: str) -> int:
    """Resident memory of this process, bytes: "VmRSS" now, "VmHWM" the most since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Linux starts the high-water mark of the resident set anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None}
    return sum(storages.values())


def held(engine: DeepSpeedEngine, model: SSACL, zero_stage: int) -> dict[str, int]:
    """Bytes that the engine holds between a backward pass and the step, by kind."""
    optimizer: Any = engine._optimizer
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor) and value.ndim]
    gradients = [parameter.grad for parameter in parameters]
    weights: list[Tensor | None] = [parameter.data for parameter in parameters]
    copies: list[Tensor] = []
    if zero_stage in (1, 2):
        copies = list(optimizer.single_partition_of_fp32_groups)
        gradients += [gradient for part in optimizer.averaged_gradients.values() for gradient in part or ()]
    if zero_stage == 3:
        weights += [parameter.ds_tensor for parameter in parameters]  # type: ignore[attr-defined]
        copies = list(optimizer.fp32_partitioned_groups_flat)
        gradients.append(optimizer.grad_partitions_flat_buffer)
    owned = {tensor.untyped_storage().data_ptr() for tensor in weights if tensor is not None}
    copies = [tensor for tensor in copies if tensor.untyped_storage().data_ptr() not in owned]
    return {"weights": bytes_of(weights), "gradients": bytes_of(gradients), "optimizer": bytes_of([*states, *copies])}


def train(config: Config, num_steps: int) -> dict[str, Any]:
    """Build the model and take a few steps; sizes, bytes held before the last step, and peaks above what there was before."""
    # As training does.
    set_freed_memory("returned" if config.engine.zero_stage == 3 else "kept")
    gc.collect()
    forget_peak()
    baseline = resident("VmRSS")
    tokenizers: Any = SimpleNamespace(text=text_tokenizer(config.model.text.vocab_size), lm=Vocabulary(config.model.language.vocab_size, 0))
    torch.manual_seed(0)
    with construction(config.engine):
        model = SSACL(config.model, config.losses, tokenizers)
    figures: dict[str, Any] = {"construction_peak": resident("VmHWM") - baseline}
    forget_peak()
    figures["num_parameters"] = sum(full_size(parameter) for parameter in model.parameters())
    figures["num_language"] = sum(full_size(parameter) for parameter in model.language.parameters())
    engine = make_engine(model, config, plan_stages(config, 10)[0])
    assert isinstance(engine, DeepSpeedEngine)
    figures["num_trained"] = engine.num_trained
    batch = random_batch(config, ROWS, torch.device("cpu"))
    step = engine._engine.step

    def look_and_step() -> None:
        figures["held"] = held(engine, model, config.engine.zero_stage)
        step()

    engine._engine.step = look_and_step
    started = time.monotonic()
    figures["losses"] = [engine.step([batch], 1.0)["total"] for _ in range(num_steps)]
    figures["step_s"] = round((time.monotonic() - started) / num_steps, 2)
    figures["training_peak"] = resident("VmHWM") - baseline
    engine._engine.step = step
    engine.close()
    return figures


def _rank(world_rank: int, folder: str, size: str, zero_stage: int) -> None:
    os.environ["LOCAL_RANK"] = str(world_rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", NUM_RANKS), rank=world_rank, world_size=NUM_RANKS)
    try:
        # What the first model of a process loads and allocates is no part of the measurement.
        tiny = configuration("small", zero_stage)
        language = tiny.model.language.model_copy(update={"width": 64, "depth": 1, "num_heads": 2, "vocab_size": 3000})
        train(tiny.model_copy(update={"model": tiny.model.model_copy(update={"language": language})}), 1)
        Path(f"{folder}/{world_rank}.json").write_text(json.dumps(train(configuration(size, zero_stage), NUM_STEPS)), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def on_two_ranks(size: str, zero_stage: int) -> list[dict[str, Any]]:
    """The figures of each rank."""
    with tempfile.TemporaryDirectory(prefix="zero-memory-") as folder:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        multiprocessing.start_processes(_rank, (folder, size, zero_stage), nprocs=NUM_RANKS, start_method="forkserver")
        return [json.loads(Path(f"{folder}/{rank}.json").read_text(encoding="utf-8")) for rank in range(NUM_RANKS)]


def _mib(count: float) -> float:
    return round(count / 2**20, 1)


def measure(options: argparse.Namespace) -> Measurement:
    figures: dict[str, Any] = {}
    goals: dict[str, Goal] = {}
    for zero_stage in range(4):
        ranks = on_two_ranks("small", zero_stage)
        first = ranks[0]
        formula = rank_memory(first["num_parameters"], first["num_trained"], zero_stage, NUM_RANKS, num_divisible=first["num_language"])
        parts = {"weights": formula.weights, "gradients": formula.gradients, "optimizer": formula.optimizer}
        total = [sum(rank["held"].values()) for rank in ranks]
        figures[f"stage_{zero_stage}"] = {
            "formula_mib": {name: _mib(value) for name, value in parts.items()},
            "held_mib": [{name: _mib(value) for name, value in rank["held"].items()} for rank in ranks],
            "held_to_formula": round(max(total, key=lambda value: abs(value - formula.device)) / formula.device, 4),
            "training_peak_mib": [_mib(rank["training_peak"]) for rank in ranks],
            "losses": first["losses"],
        }
        goals[f"stage_{zero_stage}.held_to_formula"] = Goal(min=1 - TOLERANCE, max=1 + TOLERANCE)
        logger.info("ZeRO %d: %s", zero_stage, figures[f"stage_{zero_stage}"])
    if not options.quick:
        ranks = on_two_ranks("350M", 3)
        numbers = ranks[0]["num_parameters"]
        whole = rank_memory(numbers, numbers, 0, 1)
        figures["large"] = {
            "language_model_numbers": ranks[0]["num_language"],
            "model_numbers": numbers,
            "full_weights_mib": _mib(whole.weights),
            "full_training_state_mib": _mib(whole.device),
            "construction_peak_mib": [_mib(rank["construction_peak"]) for rank in ranks],
            "training_peak_mib": [_mib(rank["training_peak"]) for rank in ranks],
            "held_mib": [{name: _mib(value) for name, value in rank["held"].items()} for rank in ranks],
            "construction_to_weights": round(max(rank["construction_peak"] for rank in ranks) / whole.weights, 4),
            "training_to_state": round(max(rank["training_peak"] for rank in ranks) / whole.device, 4),
            "step_s": ranks[0]["step_s"],
        }
        goals |= {"large.construction_to_weights": Goal(max=1.0), "large.training_to_state": Goal(max=1.0)}
        logger.info("350M: %s", figures["large"])
    config = {"ranks": NUM_RANKS, "backend": "gloo", "rows": ROWS, "steps": NUM_STEPS, "precision": "fp32", "language": LANGUAGE}
    return Measurement(figures, goals, config=config, n=NUM_STEPS)


if __name__ == "__main__":
    raise SystemExit(run_benchmark("zero_memory", measure, description=__doc__))
