"""Phrases that name a finding and its side, on phantom test films: where they land, beside the named anatomy and the average mask.

python -m benchmarks.phrases CHECKPOINT DATA_URL --truth FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.evaluation.phrases import WORDS, phrase_scores
from ssacl.inference.generator import ReportGenerator
from ssacl.progress import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="model folder, or s3:// prefix of one")
    parser.add_argument("data_url")
    parser.add_argument("--truth", type=Path, required=True, metavar="DIR")
    parser.add_argument("--limit", type=int, help="first films of each split")


def measure(options: argparse.Namespace) -> Measurement:
    """Ask and compare; see `phrase_scores` for errors."""
    limit = 20 if options.quick else options.limit
    with ProgressBar("phrases", total=None, unit="films") as bar:
        figures = phrase_scores(options.checkpoint, options.data_url, options.truth, "test", limit, bar.advance)
    maps = figures["maps"]
    figures["times_anatomy"] = {
        name: round(maps["phrase"][name] / max(maps["anatomy"][name], 1e-6), 3) for name in ("pointing", "iou", "cnr")
    }
    goals = {f"times_anatomy.{name}": Goal(min=1.0) for name in figures["times_anatomy"]}
    goals |= {"opposite.on_their_sides": Goal(min=0.95), "opposite.mean_correlation": Goal(max=0.5), "confidence.auc": Goal(min=0.8)}
    version = ReportGenerator.load(options.checkpoint).model_version
    return Measurement(
        figures=figures, goals=goals, config={"model_version": version, "words": WORDS, "limit": limit}, n=figures["num_phrases"]
    )


if __name__ == "__main__":
    sys.exit(run_benchmark("phrases", measure, add_arguments, description=__doc__))
