"""How fast a step is, as a share of what the hardware gives (MFU), and how much memory the process has taken.

Work is counted from the matrix products and convolutions that one forward pass of the stage really executes (activation checkpointing
computes some again; that is not work). A backward pass costs twice as much where weights learn, once where gradients only pass through, and
nothing where there are none.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssacl.models.divided import full_size
from ssacl.training.engine import AnyBatch, Engine
from ssacl.training.precision import resolve_precision

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_SIZES, _CUDA_SIZES = (512,), (4096, 8192)
"""Sides of the products that the peak is measured with: a CPU is at its best with small ones, and is slow."""


def matmul_peak(dtype: torch.dtype, device: torch.device, sizes: tuple[int, ...] = (1024, 1536, 2048), tries: int = 3) -> float:
    """Best measured rate of a square matrix product, in operations a second."""
    best = 0.0
    # Own generators: what training draws must not depend on whether its speed is measured.
    source = torch.Generator(device).manual_seed(0)
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, generator=source).to(dtype) for _ in range(2))
        left @ right
        for _ in range(tries):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            left @ right
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def training_peak(precision: str, device: torch.device) -> float:
    """What matrix products reach here, measured in well under a second; operations a second, for `engine.precision`."""
    sizes = _CUDA_SIZES if device.type == "cuda" else _CPU_SIZES
    return matmul_peak(_DTYPES[resolve_precision(precision, device)], device, sizes)


def step_work(engine: Engine, model: nn.Module, batch: AnyBatch) -> float:
    """Operations of one forward and backward pass over `batch` on this rank; runs one evaluation to count them, on every rank."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused}) as counter:
        engine.evaluate(batch, 1.0)
    counts = {name: sum(operations.values()) for name, operations in counter.get_flop_counts().items()}
    total = work = float(counter.get_total_flops())
    for name, part in model.named_children():
        roots = [key for key in counts if key.endswith(f".model.{name}")]
        forward = _executed(counts, min(roots, key=len)) if roots else 0.0
        work += forward * _backward_factor(part)
        total -= forward
    # What is left is the losses' own products.
    return work + 2 * total


def memory_gib(device: torch.device) -> float:
    """Most memory that this process has had so far, GiB: of the GPU's by PyTorch, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class SpeedWindow:
    """The time from one logged step to the next, and what of it was no training."""

    def __init__(self, step: int) -> None:
        self._reset(step)

    def _reset(self, step: int) -> None:
        self._step, self._started = step, time.monotonic()
        self._spent_s = {"wait": 0.0, "pause": 0.0, "checkpoint": 0.0}

    @contextmanager
    def spend(self, what: str) -> Iterator[None]:
        """The block is a "wait" for data, or stands beside training: a "checkpoint", or another "pause"."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._spent_s[what] += time.monotonic() - started

    def close(self, step: int, images: int, work: float, peak: float) -> dict[str, float]:
        """Figures of the window that ends with `step`; the next begins.

        Parameters
        ----------
        images, work : of one optimizer step: images over all ranks, operations of this rank.
        peak : operations a second that this rank's hardware gives.
        """
        num_steps, spent = step - self._step, self._spent_s
        elapsed_s = max(time.monotonic() - self._started - spent["pause"] - spent["checkpoint"], 1e-9)
        self._reset(step)
        return {
            "images_per_s": num_steps * images / elapsed_s,
            "data_wait_share": spent["wait"] / elapsed_s,
            "mfu_share": num_steps * work / elapsed_s / peak,
            "checkpoint_stall_s": spent["checkpoint"],
        }


def _executed(counts: Mapping[str, int], name: str) -> float:
    """Operations of a module: its own count, or those of its children where they are called past it (a vocabulary head)."""
    depth = name.count(".") + 1
    children = [key for key in counts if key.startswith(f"{name}.") and key.count(".") == depth]
    return max(float(counts.get(name, 0)), sum(_executed(counts, child) for child in children))


def _backward_factor(part: nn.Module) -> float:
    trained = sum(full_size(parameter) for parameter in part.parameters() if parameter.requires_grad)
    whole = sum(full_size(parameter) for parameter in part.parameters())
    return 1.0 + trained / whole if trained else 0.0


def _fused(query: Any, key: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    # Scores and their mean of values; torch has no entry for the CPU's kernel.
    rows, heads, tokens, width = query
    return int(4 * rows * heads * tokens * key[2] * width)
