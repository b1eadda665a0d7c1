"""Images per second per core of ingest from DICOM, against a plain pydicom + Pillow loop, and what a second core adds.

The plain loop reads, windows, scales, encodes and writes each film, and no more. Ingest also cuts, scrubs and labels the report, checks the
polarity, hashes pixels, packs shards and writes index and card. All are run in turn, so that a crowded machine slows them alike; Ray is up
before the clock starts. Ratios are taken within a round, and the figure is their median. The ratio per core is that of images per second of
CPU, which other work on the machine hardly changes; `wall_against_plain` is by the clock. Two cores share caches and memory: what two plain
loops side by side gain over one (`two_plain_loops_against_one`) is what the machine has to give, and stands beside what two workers gain.

Growth: time and memory to plan a CSV of `--num-planned` studies.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.dicom_films import SIZES_PX, write_films
from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.data.ingest import IngestSettings, run_local

LONGEST_SIDE_PX = 512
KEY = "phantoms have nobody to protect"
logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-films", type=int, default=480)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--num-planned", type=int, default=100_000, help="studies of the CSV that is planned")
    parser.add_argument("--work", type=Path, metavar="DIR", help="films are kept and found again here (default: a temporary folder)")


def measure(options: argparse.Namespace) -> Measurement:
    if options.quick:
        options.num_films, options.num_rounds, options.num_planned = 24, 2, 5000
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        films = write_films(work / f"films_{options.num_films}", options.num_films)
        figures, spread = _speeds(films, work / f"films_{options.num_films}", Path(temporary), options.num_rounds)
        figures["planning"] = _planning(Path(temporary), options.num_planned)
    return Measurement(
        figures,
        goals={
            "per_core_against_plain": Goal(min=0.9),
            "two_cores_against_one": Goal(min=1.7),
            "two_cores_against_two_plain_loops": Goal(min=0.9),
            "planning.cpu_seconds": Goal(max=60.0),
        },
        config={
            "num_films": options.num_films,
            "sizes_px": SIZES_PX,
            "bits": [12, 16],
            "transfer_syntax": "explicit little endian",
            "longest_side_px": LONGEST_SIDE_PX,
            "shard_size": _settings(options.num_films).shard_size,
            "num_planned": options.num_planned,
        },
        n=options.num_rounds,
        spread=spread,
    )


def plain_loop(paths: list[Path], out: Path) -> None:
    """What one would write first: the pictures alone."""
    from pydicom import dcmread
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    for number, path in enumerate(paths):
        ds = dcmread(path)
        values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)
        low, high = float(values.min()), float(values.max())
        grey = ((values - low) / (high - low) * 255).astype(np.uint8)
        scale = LONGEST_SIDE_PX / max(grey.shape)
        image = Image.fromarray(grey).resize((round(grey.shape[1] * scale), round(grey.shape[0] * scale)), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        (out / f"{path.parent.name}-{number}.jpg").write_bytes(buffer.getvalue())


def _settings(num_films: int) -> IngestSettings:
    # Sixteen shards, so that two workers share them evenly.
    return IngestSettings(key_secret=KEY, longest_side_px=LONGEST_SIDE_PX, shard_size=max(1, num_films // 16), split_shares=(1, 0, 0))


def _speeds(films: list[Path], tree: Path, work: Path, num_rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    from ray_jobs.ingest import run_ingest
    from ray_jobs.session import ray_session

    settings = _settings(len(films))
    halves = [films[::2], films[1::2]]
    ways: dict[str, Callable[[Path], object]] = {
        "plain_loop": lambda out: plain_loop(films, out),
        "two_plain_loops": lambda out: pool.starmap(plain_loop, [(half, out) for half in halves], chunksize=1),
        "ingest_one_process": lambda out: run_local("dicom-dir", tree, str(out), settings),
        "ingest_ray_1_worker": lambda out: run_ingest("dicom-dir", tree, str(out), settings, num_workers=1, progress=False),
        "ingest_ray_2_workers": lambda out: run_ingest("dicom-dir", tree, str(out), settings, num_workers=2, progress=False),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu_rates: dict[str, list[float]] = {name: [] for name in ways}
    with multiprocessing.get_context("spawn").Pool(2) as pool, ray_session(2):
        for number in range(-1, num_rounds):  # Round -1 warms up: files into the cache, workers with their imports.
            for name, way in ways.items():
                out = work / "out"
                out.mkdir()
                started, cpu_started = time.monotonic(), time.process_time()
                way(out)
                rate, cpu_rate = len(films) / (time.monotonic() - started), len(films) / (time.process_time() - cpu_started)
                shutil.rmtree(out)
                if number >= 0:
                    rates[name].append(rate)
                    cpu_rates[name].append(cpu_rate)
                    logger.info("round %d: %s %.1f images/s", number, name, rate)
    ratios = {
        "per_core_against_plain": _ratios(cpu_rates, "ingest_one_process", "plain_loop"),
        "wall_against_plain": _ratios(rates, "ingest_one_process", "plain_loop"),
        "two_cores_against_one": _ratios(rates, "ingest_ray_2_workers", "ingest_ray_1_worker"),
        "two_plain_loops_against_one": _ratios(rates, "two_plain_loops", "plain_loop"),
    }
    gains = zip(ratios["two_cores_against_one"], ratios["two_plain_loops_against_one"], strict=True)
    ratios["two_cores_against_two_plain_loops"] = [ours / machine for ours, machine in gains]
    figures = {name: round(statistics.median(values), 3) for name, values in ratios.items()}
    in_process = ("plain_loop", "ingest_one_process")  # Ray's workers spend their CPU elsewhere.
    figures["images_per_cpu_s"] = {name: round(statistics.median(cpu_rates[name]), 2) for name in in_process}
    figures["images_per_s"] = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    spread = {name: [round(min(values), 3), round(max(values), 3)] for name, values in {**ratios, **rates}.items()}
    return figures, spread


def _ratios(rates: dict[str, list[float]], ours: str, other: str) -> list[float]:
    return [one / two for one, two in zip(rates[ours], rates[other], strict=True)]


def _planning(work: Path, num_studies: int) -> dict[str, Any]:
    """Seconds of CPU and peak memory, beyond its imports, of a fresh process that plans a CSV."""
    table = work / "planned.csv"
    report = "FINDINGS: The lungs are clear. No effusion. IMPRESSION: No acute disease. " * 8
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "report", "patient"))
        writer.writerows((f"films/{number}.png", f"{report}{number}", f"p{number // 2}") for number in range(num_studies))
    program = f"""
import time
from pathlib import Path
from ssacl.data.convert import IngestSettings
from ssacl.data.plan import Standing, plan_chunks
from ssacl.data.sources import SourceOptions, open_source
settings = IngestSettings(key_secret={KEY!r})
peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before, started = peak(), time.process_time()
columns = {{role: role for role in ("image", "report", "patient")}}
plan = plan_chunks(open_source("csv", {str(table)!r}, SourceOptions(columns)), settings, Standing())
print(time.process_time() - started, peak() - before, len(plan.new))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, kilobytes, num_chunks = (float(value) for value in done.stdout.split())
    return {
        "cpu_seconds": round(seconds, 2),
        "mib": round(kilobytes / 1024, 1),
        "bytes_per_study": round(kilobytes * 1024 / num_studies),
        "num_chunks": int(num_chunks),
    }


if __name__ == "__main__":
    sys.exit(run_benchmark("ingest", measure, add_arguments, description=__doc__))
