"""From one replica's measured batch times to a fleet: replicas, time to answer and cost from 10^3 to 10^7 studies a day.

The times are measured here, with a tiny untrained model on this CPU, or given (`--batch-s`, of your model on your machine). All else is a
model: the day's shape, the delays of scaling and the rate of failures are assumptions, named in the record.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.fleet_queue import Fleet, simulate
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from ssacl.errors import ConfigError

SIZES = tuple(10**power for power in range(3, 8))
_MEASURED_BATCHES = (1, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-s", metavar="S,S,...", help="seconds of a batch of 1, 2, ... studies on one replica (default: measured)")
    parser.add_argument("--price-per-hour", type=float, default=1.0, help="of a machine with one replica, in any currency")
    parser.add_argument("--start-s", type=float, default=120.0, help="until a new replica answers")
    parser.add_argument("--failures", type=float, default=0.05, help="replicas lost per replica and day")


def measure(options: argparse.Namespace) -> Measurement:
    measured = options.batch_s is None
    batch_s = _measured(2 if options.quick else 5) if measured else _given(options.batch_s)
    fleet = Fleet(batch_s, start_s=options.start_s, failures_per_replica_day=options.failures)
    rows = {}
    started = time.monotonic()
    for size in SIZES:
        days = [simulate(fleet, size, seed) for seed in range(1 if options.quick else 3)]
        row = {name: statistics.mean(asdict(day)[name] for day in days) for name in asdict(days[0])}
        row["cost_per_1000"] = row["replica_hours"] * options.price_per_hour / row["studies"] * 1000
        rows[f"{size}"] = {name: round(value, 4) for name, value in row.items()}
        print(f"fleet: {size} studies a day: {rows[f'{size}']}", file=sys.stderr)
    largest = rows[f"{SIZES[-1]}"]
    figures = {
        "batch_s": [round(seconds, 4) for seconds in batch_s],
        "batch_s_measured_here": measured,
        "days": rows,
        "failing_ten_times_as_often": asdict(simulate(Fleet(batch_s, start_s=options.start_s, failures_per_replica_day=0.5), SIZES[2])),
        "noon_surge_of_three": asdict(simulate(fleet, SIZES[2], surge=3.0)),
        "simulation_s": round(time.monotonic() - started, 1),
        "left_over_share": largest["left_over"] / largest["studies"],
    }
    goals = {"simulation_s": Goal(max=120.0), "left_over_share": Goal(max=0.001)}
    assumed = {
        "start_s": fleet.start_s,
        "failures_per_replica_day": fleet.failures_per_replica_day,
        "price_per_hour": options.price_per_hour,
    }
    return Measurement(figures, goals, {**assumed, "min_replicas": fleet.min_replicas}, n=len(SIZES))


def _given(text: str) -> tuple[float, ...]:
    try:
        batch_s = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--batch-s {text}: write seconds, as in 0.8,1.1,1.5,1.9.") from error
    if not batch_s or min(batch_s) <= 0:
        raise ConfigError("--batch-s takes times above 0, of a batch of 1, 2, ... studies.")
    return batch_s


def _measured(repetitions: int) -> tuple[float, ...]:
    """Median seconds of batches of 1 to 4 films with an untrained model of configs/phantom_tiny.yaml; sizes in between by a line.

    Untrained, it writes until its limit of tokens: about what a long report takes.
    """
    import numpy as np
    import torch

    from ssacl.anatomy import FINDINGS
    from ssacl.config import load_config
    from ssacl.data.dicom import Picture, read_picture
    from ssacl.data.tokenization import train_tokenizers
    from ssacl.inference.generator import GenerationOptions, ReportGenerator
    from ssacl.models.ssacl import SSACL
    from ssacl.phantom import generate_study, write_dicom_tree
    from ssacl.training.checkpoint import save_model_folder

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="ssacl-fleet-") as folder:
        config = load_config(REPOSITORY / "configs" / "phantom_tiny.yaml")
        tokenizers = train_tokenizers([generate_study(0, index, size_px=32, with_truth=False).report for index in range(100)], 1000, 2000)
        model = SSACL.from_config(config, tokenizers)
        place = Path(folder)
        stages = {"stages": ["contrastive", "findings", "generation"]}
        save_model_folder(place / "model", model, config, tokenizers, dict.fromkeys(FINDINGS, 0.5), {}, stages)
        write_dicom_tree(place / "films", max(_MEASURED_BATCHES), seed=0, num_processes=1)
        pictures: list[Picture] = [read_picture(path.read_bytes()) for path in sorted((place / "films").rglob("*.dcm"))]
        generator = ReportGenerator.load(place / "model")
        options = GenerationOptions(num_beams=1, max_new_tokens=60)
        found = []
        for size in _MEASURED_BATCHES:
            times = []
            for _ in range(repetitions + 1):
                started = time.perf_counter()
                list(generator.generate(pictures[:size], options))
                times.append(time.perf_counter() - started)
            # The first one warms up.
            found.append(statistics.median(times[1:]))
    return tuple(float(value) for value in np.interp(range(1, max(_MEASURED_BATCHES) + 1), _MEASURED_BATCHES, found))


if __name__ == "__main__":
    sys.exit(run_benchmark("fleet", measure, add_arguments, description=__doc__))
