"""Do generated sentences rest on their evidence? Remove the top 20 % evidence patches, or as many random ones, and read the likelihood.

python -m benchmarks.faithfulness CHECKPOINT DATA_URL [--split test] [--limit 100]
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.evaluation.faithfulness import NUM_DRAWS, REMOVED_SHARE, faithfulness_scores
from ssacl.inference.generator import ReportGenerator
from ssacl.progress import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="model folder, or s3:// prefix of one")
    parser.add_argument("data_url")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--limit", type=int, help="first films only")


def measure(options: argparse.Namespace) -> Measurement:
    """Remove and read; see `faithfulness_scores` for errors."""
    limit = 10 if options.quick else options.limit
    with ProgressBar("faithfulness", total=None, unit="films") as bar:
        figures = faithfulness_scores(options.checkpoint, options.data_url, options.split, limit, bar.advance)
    figures["interval_low"] = figures["all"]["interval"][0]
    config = {
        "model_version": ReportGenerator.load(options.checkpoint).model_version,
        "removed_share": REMOVED_SHARE,
        "random_draws": NUM_DRAWS,
        "split": options.split,
        "limit": limit,
        "unit": "nats per sentence",
    }
    return Measurement(figures=figures, goals={"interval_low": Goal(min=0.0)}, config=config, n=figures["all"]["num_sentences"])


if __name__ == "__main__":
    sys.exit(run_benchmark("faithfulness", measure, add_arguments, description=__doc__))
