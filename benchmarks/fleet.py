"""From one replica's measured batch times to a fleet: replicas, time to answer and cost from 10^3 to 10^7 studies a day.

The times are those of the released size in a record of benchmarks/serve_load.py (`--measured`, the newest one if not given), brought to
what its endpoint answered over HTTP, or are given (`--batch-s`, of your model on your machine). All else is a model: the day's shape, the
delays of scaling and the rate of failures are assumptions, named in the record. Where a record is read, what it measured of the small
model stands beside what this model says of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fleet_queue import Fleet, simulate
from benchmarks.record import RESULTS, Goal, Measurement, run_benchmark
from ssacl.errors import ConfigError

SIZES = tuple(10**power for power in range(3, 8))
_BATCHES = (1, 2, 4)
"""Sizes that serve_load measures; those in between by a line."""
_UNSHED = ("unloaded", "load_50")
"""Loads of its record in which nothing was refused, as in the model."""
_HOUR_S, _SMALL_STEP_S = 3600, 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--measured", type=Path, metavar="FILE", help="record of benchmarks.serve_load (default: the newest one)")
    parser.add_argument("--batch-s", metavar="S,S,...", help="seconds of a batch of 1, 2, ... studies on one replica, in place of a record")
    parser.add_argument("--price-per-hour", type=float, default=1.0, help="of a machine with one replica, in any currency")
    parser.add_argument("--start-s", type=float, default=120.0, help="until a new replica answers")
    parser.add_argument("--failures", type=float, default=0.05, help="replicas lost per replica and day")


def measure(options: argparse.Namespace) -> Measurement:
    small_end = None
    if options.batch_s is None:
        record = _read(options.measured)
        batch_s, small_batch_s = of_record(record["base"]), of_record(record)
        small_end = {name: small(small_batch_s, record[name]) for name in _UNSHED}
    else:
        batch_s = _given(options.batch_s)
    fleet = Fleet(batch_s, start_s=options.start_s, failures_per_replica_day=options.failures)
    rows = {}
    started = time.process_time()
    for size in SIZES:
        days = [simulate(fleet, size, seed) for seed in range(1 if options.quick else 3)]
        row = {name: statistics.mean(asdict(day)[name] for day in days) for name in asdict(days[0])}
        row["cost_per_1000"] = row["replica_hours"] * options.price_per_hour / row["studies"] * 1000
        rows[f"{size}"] = {name: round(value, 4) for name, value in row.items()}
        print(f"fleet: {size} studies a day: {rows[f'{size}']}", file=sys.stderr)
    largest = rows[f"{SIZES[-1]}"]
    figures = {
        "batch_s": [round(seconds, 4) for seconds in batch_s],
        "small_end": small_end,
        "days": rows,
        "failing_ten_times_as_often": asdict(simulate(Fleet(batch_s, start_s=options.start_s, failures_per_replica_day=0.5), SIZES[2])),
        "noon_surge_of_three": asdict(simulate(fleet, SIZES[2], surge=3.0)),
        "simulation_cpu_s": round(time.process_time() - started, 1),
        "left_over_share": largest["left_over"] / largest["studies"],
    }
    goals = {"simulation_cpu_s": Goal(max=120.0), "left_over_share": Goal(max=0.001)}
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


def _read(path: Path | None) -> dict[str, Any]:
    """The figures of a record."""
    try:
        path = path or max(RESULTS.glob("*-serve_load.json"))
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("There is no record of benchmarks.serve_load to read: give --measured FILE, or --batch-s.") from error
    return figures


def of_record(figures: dict[str, Any]) -> tuple[float, ...]:
    """Seconds of a batch of 1, 2, ... studies: the generator's own, longer by what the endpoint answered less over HTTP."""
    rates = [figures["direct"][f"batch_{size}_per_s"] for size in _BATCHES]
    longer = max(rates) / figures["capacity_per_s"]
    measured = [longer * size / rate for size, rate in zip(_BATCHES, rates, strict=True)]
    return tuple(float(value) for value in np.interp(range(1, max(_BATCHES) + 1), _BATCHES, measured))


def small(batch_s: tuple[float, ...], load: dict[str, Any]) -> dict[str, float]:
    """One replica under a measured load, for an hour without any shape, beside what was measured."""
    fleet = Fleet(batch_s, min_replicas=1, max_replicas=1, failures_per_replica_day=0.0)
    rate = load.get("offered_per_s", load["answered_per_s"])
    hour = simulate(fleet, rate * _HOUR_S, step_s=_SMALL_STEP_S, hourly_share=np.ones(24), seconds=_HOUR_S)
    return {
        "offered_per_s": rate,
        "p95_s_measured": load["p95_s"],
        "p95_s_of_the_model": round(hour.answered_p95_s, 3),
        "model_to_measured": round(hour.answered_p95_s / load["p95_s"], 3),
    }


if __name__ == "__main__":
    sys.exit(run_benchmark("fleet", measure, add_arguments, description=__doc__))
