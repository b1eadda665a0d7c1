"""What each loss and each grounding term brings on the phantom: the contrastive stage of `phantom_small`, cut short, one change per row.

    python -m benchmarks.ablation --work DIR [--steps 240] [--rows full,no_order]

Every row trains from scratch with the same data, order and budget, and is measured on test films by its attention alone (smoothed, cut at
thresholds chosen on validation), beside the average mask and the centre. `side` is the share of one-sided findings whose side the leaves'
entity logits tell, `finding_auc` the mean AUC of whole-film findings from the same logits. A finished row is kept in the work folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.phantom_data import add_work_arguments, phantom_data, work_folder
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from ssacl.anatomy import FINDINGS, LEAVES, NO_FINDING, NODES, FindingStatus
from ssacl.config import load_config
from ssacl.data.dicom import read_picture
from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.data.transforms import load_square, normalise
from ssacl.errors import ConfigError
from ssacl.evaluation.grounding import GroundingScores, scores_with_baselines
from ssacl.evaluation.predictions import sample_digest
from ssacl.evaluation.truth import load_truth, one_sided, true_masks, true_status
from ssacl.models.findings import soft_maximum
from ssacl.training.checkpoint import open_model
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter

CONFIG = REPOSITORY / "configs" / "phantom_small.yaml"
NUM_FILMS = 140
MASK_SIDE_PX = 96
_G = "losses.grounding."
_ATLAS = [f"{_G}{term}=0" for term in ("order", "layout_chart", "pose_range", "mean_layout", "shape")]
_NO_GROUNDING = [f"{_G}enabled=false"]
ROWS: dict[str, tuple[str, list[str]]] = {
    "full": ("all terms", []),
    "published": ("the published losses alone", _NO_GROUNDING),
    "text_only": ("no atlas prior: words, equivariance, slots, compactness", [*_ATLAS, f"{_G}compactness=0.6", f"{_G}region_text=0.5"]),
    "order_only": ("of the atlas, the order relations alone", [*_ATLAS[1:], f"{_G}compactness=0.6"]),
    "no_text": ("no region text, no entities", [f"{_G}region_text=0", f"{_G}entities=0"]),
    "no_equivariance": ("neither equivariance nor its centroids", [f"{_G}equivariance=0", f"{_G}centroid=0"]),
    "no_centroid": ("equivariance of maps without that of centroids", [f"{_G}centroid=0"]),
    "no_slots": ("", [f"{_G}slots=0"]),
    "no_order": ("", [f"{_G}order=0"]),
    "no_layout_chart": ("", [f"{_G}layout_chart=0"]),
    "no_pose_range": ("", [f"{_G}pose_range=0"]),
    "no_mean_layout": ("", [f"{_G}mean_layout=0"]),
    "no_shape": ("compactness in its place", [f"{_G}shape=0", f"{_G}compactness=0.6"]),
    "no_hierarchy": ("", [f"{_G}hierarchy=0"]),
    "no_region_text": ("", [f"{_G}region_text=0"]),
    "no_entities": ("", [f"{_G}entities=0"]),
    "no_ar": ("without L_ar", ["losses.anatomy_reconstruction=0"]),
    "no_ac": ("without L_ac", ["losses.anatomical_consistency=0"]),
    "no_recursion": ("L_ar from the encoder's children, as released", ["losses.recursive_anatomy=false"]),
    "no_query_losses": ("queries without any loss", [*_NO_GROUNDING, "losses.anatomy_reconstruction=0", "losses.anatomical_consistency=0"]),
    "naive_flip": ("the release's flips", ["data.augment.flip=naive"]),
    "laterality_swap": ("flips that swap words and labels", ["data.augment.flip=laterality_swap"]),
    "half_masked": ("mask ratio 0.5, as released", ["losses.mask_ratio=0.5"]),
    "target_official": ("L_ac's target as released", ["losses.soft_target=official"]),
    "target_across_samples": ("L_ac's target softened across samples", ["losses.soft_target=across_samples"]),
}
"""Row -> what it changes, and how."""
MAIN_ROWS = ("full", "published")
"""These run with a second seed too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_work_arguments(parser)
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of the contrastive stage")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated; all by default")


def measure(options: argparse.Namespace) -> Measurement:
    """Train and measure the rows that are not in the work folder yet.

    Raises
    ------
    ConfigError
        There is no such row.
    """
    names = options.rows.split(",")
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        raise ConfigError(f"There is no row '{unknown[0]}'; give some of: {', '.join(ROWS)}.")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    data_url, truth = phantom_data(options)
    runs = [(name, seed) for name in names for seed in ((options.seed, options.seed + 1) if name in MAIN_ROWS else (options.seed,))]
    table = {f"{name}/seed{seed}": _row(name, seed, options, data_url, truth) for name, seed in runs}
    figures: dict[str, Any] = {"rows": table, "what": {name: ROWS[name][0] or name.replace("_", " ") for name in names}}
    goals = {}
    if "full" in names and "published" in names:
        figures["gain_of_grounding"] = round(
            table[f"full/seed{options.seed}"]["leaves_pointing"] - table[f"published/seed{options.seed}"]["leaves_pointing"], 4
        )
        goals["gain_of_grounding"] = Goal(min=0.1)
    config = {"config": CONFIG.name, "steps": options.steps, "num_test_films": NUM_FILMS, "maps": "attention, smoothed"}
    return Measurement(figures=figures, goals=goals, config=config, n=len(runs))


def _row(name: str, seed: int, options: argparse.Namespace, data_url: str, truth: Path) -> dict[str, Any]:
    kept = work_folder(options) / "ablation" / f"{name}-{options.steps}-{seed}.json"
    if kept.exists():
        row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return row
    print(f"ablation: {name}, seed {seed}", file=sys.stderr, flush=True)
    overrides = [
        *(f"data.url={data_url}", f"run.storage_url={work_folder(options) / 'runs'}", f"run.name=ablation-{name}-{options.steps}-{seed}"),
        *(f"run.seed={seed}", f"run.stages=[{{kind: contrastive, num_steps: {options.steps}}}]"),
        *ROWS[name][1],
    ]
    started = time.process_time()
    outcome = train(load_config(CONFIG, overrides), LogReporter(0))
    seconds = time.process_time() - started
    row = {**_scores(outcome.model_url, data_url, truth), "train_cpu_s": round(seconds, 1)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(".part")
    part.write_text(json.dumps(row), encoding="utf-8")
    part.replace(kept)
    return row


def _scores(model_url: str, data_url: str, truth_folder: Path) -> dict[str, Any]:
    truth = load_truth(truth_folder)
    model = open_model(model_url, "cpu")
    size, maps, masks, status, entities, sides = model.config.model.vision.image_size_px, [], [], [], [], []
    for split in ("val", "test"):
        entries = open_split(open_storage(data_url), split, purpose="evaluation")
        chosen = [entries[i] for i in np.unique(np.linspace(0, len(entries) - 1, NUM_FILMS).round().astype(int))]
        samples = [read_sample(open_storage(data_url), entry) for entry in chosen]
        digests = [sample_digest(sample) for sample in samples]
        squares = [normalise(load_square(read_picture(sample.image).pixels, size)[0]) for sample in samples]
        with torch.inference_mode():
            encoded = [model.model.encode(torch.as_tensor(np.stack(squares[i : i + 20]))) for i in range(0, len(squares), 20)]
        attention = torch.cat([each.attention_BGN for each in encoded])
        grid = model.config.model.vision.grid
        maps.append(attention.view(-1, len(NODES), grid, grid).numpy())
        masks.append(true_masks(truth, digests, MASK_SIDE_PX))
        status, entities = true_status(truth, digests), torch.cat([each.entities_BMF for each in encoded])
        sides = [one_sided(truth, digest) for digest in digests]
    scores = scores_with_baselines(maps[1], masks[1], maps[0], masks[0])
    row = _columns(scores["model"])
    row |= {f"baseline_{name}": _columns(scores[name])["leaves_pointing"] for name in ("average_mask", "centre")}
    present = status == FindingStatus.PRESENT
    whole = soft_maximum(entities).numpy()
    aucs = [
        roc_auc_score(present[:, f], whole[:, f])
        for f, name in enumerate(FINDINGS)
        if name != NO_FINDING and 0 < present[:, f].sum() < len(present)
    ]
    return row | {"finding_auc": round(float(np.mean(aucs)), 4), **_side_accuracy(entities, sides)}


def _columns(scores: GroundingScores) -> dict[str, Any]:
    nodes = scores.nodes
    values = {
        "right_lung_pointing": nodes["right lung"].pointing,
        "left_lung_pointing": nodes["left lung"].pointing,
        "leaves_pointing": scores.mean("pointing", LEAVES),
        "leaves_iou": scores.mean("iou", LEAVES),
        "heart_pointing": nodes["cardiac silhouette"].pointing,
        "correlation_x": scores.mean("correlation_x", LEAVES),
        "correlation_y": scores.mean("correlation_y", LEAVES),
    }
    return {name: None if value is None else round(value, 4) for name, value in values.items()}


def _side_accuracy(entities_BMF: torch.Tensor, sides: list[dict[str, str]]) -> dict[str, Any]:
    right, left = (
        [i for i, leaf in enumerate(LEAVES) if leaf.startswith(side + " ") and not leaf.endswith("atrium")] for side in ("right", "left")
    )
    told = [
        (float(evidence[right, f].max()) > float(evidence[left, f].max())) == (side == "right")
        for evidence, found in zip(entities_BMF, sides, strict=True)
        for name, side in found.items()
        for f in [FINDINGS.index(name)]
    ]
    return {"side": round(float(np.mean(told)), 4) if told else None, "num_one_sided": len(told)}


if __name__ == "__main__":
    sys.exit(run_benchmark("ablation", measure, add_arguments, description=__doc__))
