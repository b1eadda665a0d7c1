"""The mirror test: films turned left to right must turn left into right in maps, findings and text.

python -m benchmarks.mirror CHECKPOINT DATA_URL [--truth DIR] [--split test] [--limit N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.evaluation.mirror import mirror_scores
from ssacl.inference.generator import ReportGenerator
from ssacl.progress import ProgressBar

AGREEMENT = 0.95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="model folder, or s3:// prefix of one")
    parser.add_argument("data_url")
    parser.add_argument("--truth", type=Path, metavar="DIR", help="truth of a phantom data set: are the sides right, too?")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--limit", type=int, help="first films only")


def measure(options: argparse.Namespace) -> Measurement:
    """Answer twice and compare; see `mirror_scores` for errors."""
    limit = 10 if options.quick else options.limit
    with ProgressBar("mirror", total=None, unit="films") as bar:
        figures = mirror_scores(options.checkpoint, options.data_url, options.split, options.truth, limit, bar.advance)
    goals = {f"{kind}.agreement.value": Goal(min=AGREEMENT) for kind in ("maps", "findings", "text")}
    goals["maps.on_their_side.plain"] = Goal(min=AGREEMENT)
    if options.truth is not None:
        goals["findings.side.right_side_plain.value"] = Goal(min=0.9)
    version = ReportGenerator.load(options.checkpoint).model_version
    config = {"model_version": version, "split": options.split, "limit": limit}
    return Measurement(figures=figures, goals=goals, config=config, n=figures["num_films"])


if __name__ == "__main__":
    sys.exit(run_benchmark("mirror", measure, add_arguments, description=__doc__))
