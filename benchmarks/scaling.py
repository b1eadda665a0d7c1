"""From 1 to 1,024 GPUs: what a step takes and holds, what breaks first. A model, calibrated on one and two gloo ranks of this machine.

    python -m benchmarks.scaling [--quick] [--save] [--mfu .45] [--cards-per-node 8]

Rows marked `measured` ran here; all others are `computed` from `benchmarks/scaling_model.py` and the data sheets that stand in its
`Hardware`: no GPU was at hand. Every rank keeps the preset's micro batch, so the global batch grows with the ranks.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import asdict, replace
from typing import Any

from benchmarks.record import Goal, Measurement, run_benchmark
from benchmarks.scaling_measured import SIZES_BYTES, measured, measured_workload
from benchmarks.scaling_model import Hardware, Prediction, Workload, gather_bytes, latency_s, predict, zero_bytes
from benchmarks.scaling_work import STAGES, workload
from ssacl.training.footprint import rank_memory

logger = logging.getLogger("scaling")

WORLD_SIZES = tuple(2**power for power in range(11))
TRAINING_IMAGES = 237_000
"""Frontal films of MIMIC-CXR's training split, about (assumed)."""
FEWEST_STEPS_PER_EPOCH = 100
"""Below this an epoch is too few optimizer steps for the presets' schedules, whatever the machines can do (assumed)."""
WORST_EFFICIENCY = 0.5
_EXTRA = (("mimic_cxr_large_lm", "contrastive"),)


def measure(options: argparse.Namespace) -> Measurement:
    """Measure here, compute the rest."""
    hardware = Hardware(mfu=options.mfu, cards_per_node=options.cards_per_node)
    found = measured(2 if options.quick else 8)
    calibration = _calibration(found)
    figures: dict[str, Any] = {"calibration": calibration, "measured": _measured_rows(found)}
    for preset, stage in (*STAGES.items(), *_EXTRA):
        logger.info("%s, %s", preset, stage)
        work = workload(preset, stage)
        predictions = [predict(work, hardware, size) for size in WORLD_SIZES]
        figures[f"{preset}, {stage}"] = {
            "rows": [_row(work, item, predictions[0], hardware) for item in predictions],
            "breaks": _breaks(work, predictions, hardware),
            "workload": {name: round(value) if isinstance(value, float) else value for name, value in asdict(work).items()},
            "memory_gib_by_zero_stage_on_8": _by_stage(work),
            "efficiency_on_1024_with_one_card_a_node": _with_one_card(work, hardware),
        }
    spread = {name: [round(min(part["steps_s"]), 4), round(max(part["steps_s"]), 4)] for name, part in found.items()}
    config = {
        "hardware": asdict(hardware),
        "training_images": TRAINING_IMAGES,
        "fewest_steps_per_epoch": FEWEST_STEPS_PER_EPOCH,
        "measured_on": "gloo, one thread a rank, float32, ZeRO 2, benchmarks.train_step's small model",
    }
    # The formulae must give what two ranks really lose to communication, within what a crowded machine lets one see.
    goals = {"calibration.predicted_over_measured_step": Goal(min=0.8, max=1.25)}
    return Measurement(figures, goals, config, n=len(found["alone"]["steps_s"]), spread=spread)


def _calibration(found: dict[str, Any]) -> dict[str, Any]:
    """The measured rate and latency of gloo put into the formulae, against the measured step of two ranks."""
    work = measured_workload(found)
    seconds = {int(size): value for size, value in found["together"]["all_reduce_s"].items()}
    small, large = SIZES_BYTES[0], SIZES_BYTES[-1]
    # An all-reduce among two sends each byte once (2 n (W - 1) / W = n).
    rate, hop_s = large / seconds[large], seconds[small] / 2
    volume = zero_bytes(work, 2) + gather_bytes(work, 2)
    communication_s = volume / rate + latency_s(work, Hardware(node_hop_s=hop_s), 2)
    beside_s, together_s = found["beside"]["step_s"], found["together"]["step_s"]
    return {
        "all_reduce_ms": {size: round(1e3 * value, 3) for size, value in seconds.items()},
        "gloo_mb_per_s": round(rate / 1e6, 1),
        "gloo_hop_us": round(1e6 * hop_s, 1),
        "volume_mb": round(volume / 1e6, 2),
        "communication_s": {"measured": round(together_s - beside_s, 4), "predicted": round(communication_s, 4)},
        "step_s": {
            "alone": round(found["alone"]["step_s"], 4),
            "beside another process": round(beside_s, 4),
            "together, measured": round(together_s, 4),
            "together, predicted": round(beside_s + communication_s, 4),
        },
        "predicted_over_measured_step": round((beside_s + communication_s) / together_s, 4),
    }


def _measured_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    work = measured_workload(found)
    images = work.micro_batch_size * work.accumulation_steps
    rates = {1: images / found["alone"]["step_s"], 2: 2 * images / found["together"]["step_s"]}
    fair = 2 * images / found["beside"]["step_s"]
    return [
        {"ranks": 1, "source": "measured", "images_per_s": round(rates[1], 3), "efficiency": 1.0},
        {
            "ranks": 2,
            "source": "measured",
            "images_per_s": round(rates[2], 3),
            "efficiency": round(rates[2] / (2 * rates[1]), 3),
            "efficiency_beside_two_that_share_the_machine": round(rates[2] / fair, 3),
        },
    ]


def _row(work: Workload, item: Prediction, first: Prediction, hardware: Hardware) -> dict[str, Any]:
    return {
        "gpus": item.world_size,
        "source": "computed",
        "images_per_s": round(item.images_per_s),
        "efficiency": round(_efficiency(item, first), 3),
        "step_ms": round(1e3 * item.step_s, 1),
        "share": {
            name: round(value / item.step_s, 3)
            for name, value in (
                ("work", item.compute_s),
                ("L_ac", item.consistency_s),
                ("ZeRO volume", item.zero_s),
                ("gathered rows", item.gather_s),
                ("latency", item.latency_s),
            )
        },
        "memory_gib": round(item.memory_bytes / 2**30, 1),
        "fits": item.memory_bytes / 2**30 < hardware.memory_gib,
        "steps_per_epoch": TRAINING_IMAGES // item.images,
        "largest_cost": item.largest_cost,
    }


def _efficiency(item: Prediction, first: Prediction) -> float:
    return item.images_per_s / (item.world_size * first.images_per_s)


def _breaks(work: Workload, predictions: list[Prediction], hardware: Hardware) -> list[dict[str, Any]]:
    """What stops being reasonable, and from how many GPUs on; the first comes first."""
    first = predictions[0]
    checks = {
        "memory: does not fit": lambda item: item.memory_bytes / 2**30 >= hardware.memory_gib,
        f"learning: fewer than {FEWEST_STEPS_PER_EPOCH} steps an epoch": lambda item: (
            TRAINING_IMAGES // item.images < FEWEST_STEPS_PER_EPOCH
        ),
        f"speed: efficiency below {WORST_EFFICIENCY:g}": lambda item: _efficiency(item, first) < WORST_EFFICIENCY,
    }
    found = []
    for name, broken in checks.items():
        sizes = [item for item in predictions if broken(item)]
        if sizes:
            cause = f", by {sizes[0].largest_cost}" if name.startswith("speed") else ""
            found.append({"what": name + cause, "gpus": [sizes[0].world_size, sizes[-1].world_size]})
    return sorted(found, key=lambda item: item["gpus"][0])


def _by_stage(work: Workload) -> dict[str, float]:
    """Between steps, on 8 ranks."""
    return {f"zero_{stage}": round(rank_memory(work.num_parameters, work.num_trained, stage, 8).device / 2**30, 2) for stage in range(4)}


def _with_one_card(work: Workload, hardware: Hardware) -> float:
    slow = replace(hardware, cards_per_node=1)
    return round(_efficiency(predict(work, slow, WORLD_SIZES[-1]), predict(work, slow, 1)), 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mfu", type=float, default=Hardware.mfu, help="share of the peak that a step's own work reaches (default .45)")
    parser.add_argument("--cards-per-node", type=int, default=Hardware.cards_per_node, metavar="N", help="of 400 Gb/s (default 8)")


if __name__ == "__main__":
    sys.exit(run_benchmark("scaling", measure, add_arguments, description=__doc__))
