"""How reports are searched for: quality against cost of beams, penalties, lengths, and prompts with or without the head's findings.

python -m benchmarks.generation_options CHECKPOINT DATA_URL [--limit 100]

On films of the validation split, where such options are to be chosen: the test split stays out of it. Each row changes one option of the
defaults; `release` has all of the published release's. Cost is CPU or GPU time of `generate` alone, the rows in turns, batch by batch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

from benchmarks.record import Measurement, run_benchmark
from ssacl.config import Config
from ssacl.data.dicom import Picture, read_picture
from ssacl.data.loader import open_split
from ssacl.data.reports import training_text
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.evaluation.mistakes import is_truncated
from ssacl.evaluation.text import diversity, text_scores
from ssacl.inference.decoding import GenerationOptions
from ssacl.inference.generator import ReportGenerator
from ssacl.progress import ProgressBar
from ssacl.scores.clinical import report_f1
from ssacl.training.checkpoint import open_model

BATCH = 8
ROWS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "1 beam": {"num_beams": 1},
    "5 beams": {"num_beams": 5},
    "8 beams": {"num_beams": 8},
    "length penalty 0": {"length_penalty": 0.0},
    "length penalty 2": {"length_penalty": 2.0},
    "repetition penalty 1.2": {"repetition_penalty": 1.2},
    "repetition penalty 2": {"repetition_penalty": 2.0},
    "at least 40 tokens": {"min_new_tokens": 40},
    "at most 40 tokens": {"max_new_tokens": 40},
    "without entities": {"entities": False},
    "without entities, 1 beam": {"entities": False, "num_beams": 1},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="model folder, or s3:// prefix of one")
    parser.add_argument("data_url")
    parser.add_argument("--limit", type=int, default=100, help="first validation films (default 100)")
    parser.add_argument("--device", default="cpu")


def measure(options: argparse.Namespace) -> Measurement:
    """Write every film's report under every row of options.

    Raises
    ------
    SSACLError
        The checkpoint, the data set or a film cannot be read.
    """
    loaded = open_model(options.checkpoint, options.device)
    generator = ReportGenerator(loaded, options.device)
    pictures, references = films_of(options.data_url, loaded.config, 8 if options.quick else options.limit)
    rows = {name: GenerationOptions(max_batch_size=BATCH, **changes) for name, changes in ROWS.items()}
    rows["release"] = GenerationOptions.release().model_copy(update={"max_batch_size": BATCH})
    reports: dict[str, list[str]] = {name: [] for name in rows}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    generator.generate(pictures[:BATCH], rows["defaults"])
    with ProgressBar("reports", total=len(rows) * len(pictures), unit="reports") as bar:
        for first in range(0, len(pictures), BATCH):
            batch = pictures[first : first + BATCH]
            for name, row in rows.items():
                started = time.perf_counter()
                reports[name] += [draft.text for draft in generator.generate(batch, row)]
                seconds[name].append((time.perf_counter() - started) / len(batch))
                bar.advance(len(batch))
    reference_s = statistics.median(seconds["defaults"])
    figures = {
        name: {
            **_quality(reports[name], references, loaded.config),
            "ms_per_report": round(1e3 * statistics.median(seconds[name]), 1),
            "times_defaults": round(statistics.median(seconds[name]) / reference_s, 3),
        }
        for name in rows
    }
    spread = {name: [round(1e3 * min(each), 1), round(1e3 * max(each), 1)] for name, each in seconds.items()}
    config = {"model_version": loaded.model_version, "split": "val", "batch": BATCH, "defaults": rows["defaults"].model_dump()}
    return Measurement(figures={"rows": figures}, goals={}, config=config, n=len(pictures), spread=spread)


def films_of(data_url: str, config: Config, limit: int) -> tuple[list[Picture], list[str]]:
    """The first films of the validation split that have a report, and their reports."""
    storage = open_storage(data_url)
    samples = (read_sample(storage, entry) for entry in open_split(storage, "val", purpose="validation"))
    pictures, references = [], []
    for sample in samples:
        if len(pictures) == limit:
            break
        if text := training_text(sample, config.data.sections):
            pictures.append(read_picture(sample.image))
            references.append(text)
    return pictures, references


def _quality(reports: list[str], references: list[str], config: Config) -> dict[str, Any]:
    scores = text_scores(reports, references)
    spread = diversity(reports)
    figures = {
        "findings_f1_micro_14": report_f1(reports, references, config.data.uncertain).micro["14"].f1,
        **{name: scores[name] for name in ("bleu_4", "rouge_l", "cider_d")},
        "distinct_share": spread["distinct_share"],
        "words": statistics.mean(len(report.split()) for report in reports),
        "truncated_share": statistics.mean(is_truncated(report) for report in reports),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


if __name__ == "__main__":
    sys.exit(run_benchmark("generation_options", measure, add_arguments, description=__doc__))
