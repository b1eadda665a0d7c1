"""`make demo` as a benchmark: seconds of each part, and what its metrics say beside their baselines.

`--from DIR` records a demo that has just run there instead of running one. The set-up (`make setup`) is not part of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import Goal, Measurement, run_benchmark
from ray_jobs.demo import run_demo
from ssacl.errors import DataError

TIME_S = 630.0
"""Twelve minutes less a minute and a half for the set-up on a fresh machine."""
MARGIN = 1.25
"""A figure beats its baseline clearly when it is at least a quarter better."""
BEATS = ("findings_f1_micro_13", "findings_f1_macro_13", "true_findings_f1_micro_13", "true_findings_f1_macro_13")
AT_LEAST = ("bleu_4", "right_lung_pointing", "left_lung_pointing", "leaves_pointing", "right_lung_iou", "left_lung_iou", "leaves_iou")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR", help="the folder of a demo that has just run")


def measure(options: argparse.Namespace) -> Measurement:
    """Run the demo, or read one.

    Raises
    ------
    DataError
        `--from` names a folder without metrics.json.
    """
    if options.folder is not None:
        metrics = _read(options.folder / "metrics.json")
    else:
        with tempfile.TemporaryDirectory(prefix="ssacl-demo-") as folder:
            metrics = run_demo(Path(folder), 200 if options.quick else 2000, 0, 0, [])
    rows = {row["figure"]: {name: row[name] for name in ("model", "baseline", "baseline_name")} for row in metrics["rows"]}
    ratios = {name: round(row["model"] / max(row["baseline"], 1e-6), 3) for name, row in rows.items() if row["baseline"] is not None}
    seconds = metrics["seconds"]
    bleu = {name: scores["bleu_4"] for name, scores in metrics["details"]["reports"]["text"].items()}
    figures = {"seconds": seconds, "total_s": round(sum(seconds.values()), 1), "scores": rows, "times_baseline": ratios, "bleu_4": bleu}
    figures["bleu_4_times_majority"] = round(bleu["model"] / bleu["majority"], 3)
    goals = {f"times_baseline.{name}": Goal(min=MARGIN) for name in BEATS}
    goals |= {f"times_baseline.{name}": Goal(min=1.0) for name in AT_LEAST}
    goals["bleu_4_times_majority"] = Goal(min=1.1)
    goals |= {"total_s": Goal(max=TIME_S), "scores.distinct_share.model": Goal(min=1 / 3)}
    return Measurement(
        figures=figures, goals=goals, config=metrics["data"] | {"generation": metrics["generation"]}, n=metrics["data"]["num_cases"]
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path.name} of a finished demo is missing or not readable there; run `make demo` first.") from error
    return tree


if __name__ == "__main__":
    sys.exit(run_benchmark("demo", measure, add_arguments, description=__doc__))
