"""`ssacl evaluate reports --pairs` on many pairs of phantom reports: seconds, and what more pairs cost in memory.

Each size runs in a process of its own, so that its peak is its own. Predictions are the reference's findings in other words, or those of
another film.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from ssacl.data.reports import split_sections, training_text
from ssacl.errors import DataError
from ssacl.phantom.findings import draw_findings
from ssacl.phantom.reports import write_report

NUM_PAIRS = 10_000
SMALL = 2_500
TIME_S = 120.0
MEMORY_MIB = 150.0
"""What three times as many pairs more may add: numbers of 7,500 cases, not their texts."""
_COMMAND = "import sys; from benchmarks.evaluate_reports import child; child(sys.argv[1], sys.argv[2])"


def write_pairs(path: Path, count: int, seed: int = 0) -> None:
    """A file of `count` pairs."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            findings = draw_findings(rng)
            said = findings if rng.random() < 0.5 else draw_findings(rng)
            reference, prediction = (training_text(split_sections(write_report(each, "PA", False, rng))) for each in (findings, said))
            file.write(json.dumps({"id": f"{number:06d}", "prediction": prediction, "reference": reference}) + "\n")


def child(pairs: str, out: str) -> None:
    """Evaluate, then print seconds and the peak of resident memory."""
    from ssacl.evaluation.pairs_evaluation import evaluate_pairs

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started, cpu = time.monotonic(), time.process_time()
    card = evaluate_pairs(pairs, out)
    wall, cpu = time.monotonic() - started, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {name: round(card["metrics"][name], 4) for name in ("bleu_4", "rouge_l", "cider_d", "clinical_f1_micro_14")}
    print(json.dumps({"wall_s": round(wall, 1), "cpu_s": round(cpu, 1), "start_mib": round(before), "peak_mib": round(peak), **figures}))


def measure(options: argparse.Namespace) -> Measurement:
    """Run both sizes.

    Raises
    ------
    DataError
        An evaluation failed.
    """
    sizes = (SMALL // 10, NUM_PAIRS // 10) if options.quick else (SMALL, NUM_PAIRS)
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="ssacl-pairs-") as folder:
        for size in sizes:
            pairs = Path(folder) / f"{size}.jsonl"
            write_pairs(pairs, size)
            command = [sys.executable, "-c", _COMMAND, str(pairs), str(Path(folder) / str(size))]
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
            if done.returncode:
                raise DataError(f"The evaluation of {size} pairs failed: {done.stderr.strip().splitlines()[-1:]}")
            runs[str(size)] = json.loads(done.stdout.splitlines()[-1])
    small, large = (runs[str(size)] for size in sizes)
    figures = {"runs": runs, "wall_s": large["wall_s"], "memory_growth_mib": large["peak_mib"] - small["peak_mib"]}
    goals = {"wall_s": Goal(max=TIME_S), "memory_growth_mib": Goal(max=MEMORY_MIB)}
    return Measurement(figures=figures, goals=goals, config={"sizes": sizes, "java": False}, n=sizes[1])


if __name__ == "__main__":
    sys.exit(run_benchmark("evaluate_reports", measure, description=__doc__))
