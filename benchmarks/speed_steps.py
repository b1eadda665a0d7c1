"""What each step away from the release's work brings: one joint training step (forward and backward) by variant, in one run, in turns.

    python -m benchmarks.speed_steps [--preset base] [--batch 2] [--rounds 2]

`release` does what the release does; a row `release, NAME` leaves out one of its wastes; `official` leaves out all and keeps queries out of
the patches' attention; `paper` shares the masked pass too. The last rows say what activation checkpointing, bfloat16 and torch.compile do
to `paper`; a row that does not pay here is no default here.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
from typing import Any

import torch

from benchmarks.record import Goal, Measurement, run_benchmark
from benchmarks.release_cost import SAVINGS
from benchmarks.train_step import SIZES, Timed, time_steps
from ssacl.errors import ConfigError
from ssacl.training.precision import multiplies_bf16

logger = logging.getLogger("speed_steps")


def variants(device: torch.device, with_compile: bool) -> dict[str, Timed]:
    """Row name -> what it times."""
    rows = {"release": Timed("release", "fp32")}
    rows |= {f"release, {name}": Timed("release", "fp32", without=frozenset({name})) for name in SAVINGS}
    rows |= {"release, all of these": Timed("release", "fp32", without=frozenset(SAVINGS))}
    rows |= {"official": Timed("official", "fp32"), "paper": Timed("paper", "fp32")}
    rows |= {"paper, activation checkpointing": Timed("paper", "fp32", checkpointing=True)}
    if multiplies_bf16(device):
        rows["paper, bf16"] = Timed("paper", "bf16")
    if with_compile:
        rows["paper, compiled"] = Timed("paper", "fp32", compile=True)
    return rows


def measure(options: argparse.Namespace) -> Measurement:
    """Time every row in turns; see `time_steps`."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a CUDA device; use --device cpu.")
    rows = variants(torch.device(options.device), options.compile)
    rounds = 1 if options.quick else options.rounds
    for number in range(rounds):
        for name, timed in rows.items():
            logger.info("round %d of %d: %s", number + 1, rounds, name)
            time_steps(timed, options, steps=1 if options.quick else options.steps, warm_up=1)
    reference = statistics.median(rows["release"].gradient_s)
    figures: dict[str, Any] = {name: _figures(timed, reference) for name, timed in rows.items()}
    figures["what"] = SAVINGS
    config = {
        **{name: getattr(options, name) for name in ("preset", "batch", "device")},
        "threads": torch.get_num_threads(),
        "time": "forward + backward, median",
        "bf16": "the hardware multiplies it" if "paper, bf16" in rows else "left out: emulated on this hardware",
    }
    spread = {name: [round(1e3 * min(timed.gradient_s)), round(1e3 * max(timed.gradient_s))] for name, timed in rows.items()}
    goals = {"paper.times_release": Goal(min=1.4), "official.times_release": Goal(min=1.25)} if options.preset == "base" else {}
    return Measurement(figures, goals, config, n=len(rows["release"].gradient_s), spread=spread)


def _figures(timed: Timed, reference_s: float) -> dict[str, Any]:
    seconds = statistics.median(timed.gradient_s)
    return {
        "gradient_ms": round(1e3 * seconds),
        "times_release": round(reference_s / seconds, 3),
        "peak_memory_gib": round(timed.peak_bytes / 2**30, 2),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=sorted(SIZES), default="base")
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images (default 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=2, help="times that each row's turn comes (default 2)")
    parser.add_argument("--steps", type=int, default=1, help="timed steps in each turn (default 1)")
    parser.add_argument("--compile", action="store_true", help="a row with compiled blocks too (a minute of compiling on a CPU)")
    parser.set_defaults(default_allocator=False)


if __name__ == "__main__":
    sys.exit(run_benchmark("speed_steps", measure, add_arguments, description=__doc__))
