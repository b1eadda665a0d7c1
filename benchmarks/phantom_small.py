"""What `configs/phantom_small.yaml` learns in at most twenty CPU minutes without any box: maps, findings, reports, and the mirror test.

    python -m benchmarks.phantom_small --work DIR [--seed 0]

Trains (or goes on where it stood), then measures on the test split. Maps stand beside the centre and the average mask of validation; the
atlas prior is part of the training (`benchmarks/ablation.py` has rows without it). Phrases and faithfulness have benchmarks of their own,
which take the model folder that this one leaves in `DIR/runs`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.phantom_data import add_work_arguments, phantom_data, work_folder
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from ssacl.anatomy import LEAVES
from ssacl.config import Config, load_config
from ssacl.evaluation.mirror import mirror_scores
from ssacl.evaluation.scorecard import make_card
from ssacl.evaluation.study_set import evaluate_split
from ssacl.progress import ProgressBar
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter

CPU_MINUTES = 20.0
GOALS = {
    "train_cpu_min": Goal(max=CPU_MINUTES),
    "maps.model.right_lung_pointing": Goal(min=0.98),
    "maps.model.left_lung_pointing": Goal(min=0.98),
    "maps.model.leaves_pointing": Goal(min=0.95),
    "maps.model.leaves_iou": Goal(min=0.40),
    "maps.model.heart_pointing": Goal(min=0.90),
    "maps.model.correlation_x": Goal(min=0.95),
    "maps.model.correlation_y": Goal(min=0.95),
    "maps.average_mask.leaves_pointing": Goal(max=0.5),
    "findings_f1_micro_13": Goal(min=0.85),
    "mirror.maps.agreement.value": Goal(min=0.95),
    "mirror.findings.agreement.value": Goal(min=0.95),
    "mirror.text.agreement.value": Goal(min=0.95),
    "mirror.maps.on_their_side.plain": Goal(min=0.95),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_work_arguments(parser)


def measure(options: argparse.Namespace) -> Measurement:
    """Train, evaluate, mirror.

    Raises
    ------
    SSACLError
        Whatever training or evaluation names.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    data_url, truth = phantom_data(options)
    generation = "{kind: generation, num_steps: 2, freeze_encoder: true}"
    stages = ("{kind: contrastive, num_steps: 4}", "{kind: text, num_steps: 4}", "{kind: findings, num_steps: 4}", generation)
    quick = [f"run.stages=[{', '.join(stages)}]"]
    overrides = [
        *(f"data.url={data_url}", f"run.storage_url={work_folder(options) / 'runs'}", f"run.seed={options.seed}"),
        *(f"run.name=phantom_small-{options.seed}", *(quick if options.quick else [])),
    ]
    config = load_config(REPOSITORY / "configs" / "phantom_small.yaml", overrides)
    model_url, cpu_s = _trained(config, work_folder(options) / f"phantom_small-{options.seed}.json")
    limit = 8 if options.quick else None
    with ProgressBar("evaluate", total=None, unit="films") as bar:
        evaluation = evaluate_split(model_url, data_url, "test", truth, limit, bar.advance)
        mirror = mirror_scores(model_url, data_url, "test", truth, limit, bar.advance)
    card = make_card(evaluation)
    figures: dict[str, Any] = {
        "train_cpu_min": round(cpu_s / 60, 2),
        "maps": {name: _maps(scores) for name, scores in evaluation.metrics["maps"].items()},
        "nodes": {
            node: {key: each[key] for key in ("pointing", "iou")} for node, each in evaluation.metrics["maps"]["model"]["nodes"].items()
        },
        **card["metrics"],
        "rows": card["rows"],
        "mirror": mirror,
    }
    # A record names no folder of the machine that made it.
    tree = config.model_dump(mode="json")
    tree |= {"data": data_url.rsplit("/", 1)[-1], "run": tree["run"] | {"storage_url": "runs"}}
    return Measurement(
        figures=figures,
        goals=GOALS,
        config=tree,
        n=card["data"]["num_cases"],
    )


def _trained(config: Config, kept: Path) -> tuple[str, float]:
    """The model's place, and the CPU seconds of training: those of the run that made it, where this call only found it."""
    started = time.process_time()
    outcome = train(config, LogReporter(0))
    seconds = time.process_time() - started
    if kept.exists():
        seconds = json.loads(kept.read_text(encoding="utf-8"))["train_cpu_s"]
    else:
        kept.write_text(json.dumps({"train_cpu_s": seconds}), encoding="utf-8")
    return outcome.model_url, seconds


def _maps(scores: dict[str, Any]) -> dict[str, Any]:
    nodes, leaves = scores["nodes"], scores["means"]["leaves"]
    return {
        "right_lung_pointing": nodes["right lung"]["pointing"],
        "left_lung_pointing": nodes["left lung"]["pointing"],
        "right_lung_iou": nodes["right lung"]["iou"],
        "left_lung_iou": nodes["left lung"]["iou"],
        "leaves_pointing": leaves["pointing"],
        "leaves_iou": leaves["iou"],
        "inner_nodes_iou": scores["means"]["inner_nodes"]["iou"],
        "heart_pointing": nodes["cardiac silhouette"]["pointing"],
        "heart_iou": nodes["cardiac silhouette"]["iou"],
        "correlation_x": leaves["correlation_x"],
        "correlation_y": leaves["correlation_y"],
        "num_leaves": len(LEAVES),
    }


if __name__ == "__main__":
    sys.exit(run_benchmark("phantom_small", measure, add_arguments, description=__doc__))
