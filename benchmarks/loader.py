"""The streaming loader from a real S3 server (rclone), against decoding from memory and against webdataset; its memory; how it grows.

    python -m benchmarks.loader [--save]

Films are 64 phantoms of 512 px (JPEG, quality 95) under as many keys as there are samples; text work is warm in every arm. The arms take
turns; a turn first takes what an arm had ready, then times batches. A ratio is the median over turns of a turn's ratio. Server and loader
share the machine's cores. The order has fewer lanes than by default, so that the set is several times what lies open, as at scale; reads
are as long. CPU time is that of all processes, the server's included; its
ratios hold on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import loader_arms as arms
from benchmarks.loader_data import bytes_of_samples, write_films
from benchmarks.loader_scale import epochs_in_memory, growth, tree_cpu_s
from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.config import DataConfig, VisionConfig
from ssacl.data.collate import Collator
from ssacl.data.loader import open_split
from ssacl.data.records import Batch
from ssacl.data.s3_server import EmbeddedS3, embedded_s3
from ssacl.data.shards import encode_document, read_sample
from ssacl.data.storage import open_storage

logger = logging.getLogger("loader")

BATCH, NUM_DECODERS, READY, LANES = 32, 2, 8, 32
"""Samples per batch; threads or processes per arm; batches that an arm may have ready when its turn begins; lanes of our order."""
GOALS = {
    "cpu_ratios.s3_threads_to_memory_threads": Goal(min=0.9),
    "cpu_ratios.s3_processes_to_memory_processes": Goal(min=0.9),
    "cpu_ratios.s3_processes_to_webdataset": Goal(min=1.0),
    "ratios.s3_threads_to_memory_threads": Goal(min=0.9),
    "ratios.s3_processes_to_memory_processes": Goal(min=0.9),
    "ratios.s3_processes_to_webdataset": Goal(min=1.0),
    "epochs.growth_mib": Goal(max=32),
}
_RATIOS = (
    ("s3_threads", "memory_threads"),
    ("s3_processes", "memory_processes"),
    ("s3_processes", "webdataset"),
    ("s3_threads", "webdataset"),
    ("s3_single_reads", "memory_threads"),
)


def measure(options: argparse.Namespace) -> Measurement:
    """All of it, in one run.

    Raises
    ------
    StorageError
        The S3 server does not start.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ssacl-loader-") as folder, embedded_s3(folder) as server:
        os.environ.update(server.environment)
        rates, work, data = _throughput(server, 256 if options.quick else 2048, 1 if options.quick else 5, 2 if options.quick else 16)
        figures: dict[str, Any] = {
            "samples_per_s": {name: round(statistics.median(values), 2) for name, values in rates.items()},
            "cpu_ms_per_sample": {name: round(statistics.median(values), 3) for name, values in work.items()},
            "cpu_ratios": {f"{ours}_to_{other}": _ratio(work, other, ours) for ours, other in _RATIOS},
            "ratios": {f"{ours}_to_{other}": _ratio(rates, ours, other) for ours, other in _RATIOS},
            "data": data,
            "epochs": epochs_in_memory(server, Path(folder), 2 if options.quick else 10),
            "growth": growth(server, (100, 1000) if options.quick else (1000, 10_000, 100_000)),
        }
    spread = {
        **{name: [round(min(values), 1), round(max(values), 1)] for name, values in rates.items()},
        **{f"{ours}_to_{other}": _ratio_range(rates, ours, other) for ours, other in _RATIOS},
        **{f"cpu_{ours}_to_{other}": _ratio_range(work, other, ours) for ours, other in _RATIOS},
    }
    config = {"batch": BATCH, "decoders": NUM_DECODERS, "image_size_px": VisionConfig().image_size_px, **_loading()}
    return Measurement(figures, GOALS, config, n=len(rates["s3_threads"]), spread=spread)


def _throughput(
    server: EmbeddedS3, num_samples: int, num_turns: int, num_batches: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Any]]:
    storage = open_storage("s3://ssacl/films")
    collator = Collator(DataConfig(), VisionConfig(), write_films(storage, num_samples), 0, training=True)
    samples = [read_sample(storage, entry) for entry in open_split(storage, "train", purpose="training")]
    for sample in samples:
        collator.row(sample, 0)
    encoded = [(sample.key, sample.image, encode_document(sample)) for sample in samples]
    logger.info("%d samples written, read and warm", num_samples)
    # Those that fork come first, before there are threads.
    ways: dict[str, Iterator[Batch]] = {
        "memory_processes": arms.memory_processes(encoded, collator, NUM_DECODERS, BATCH),
        "webdataset": arms.webdataset(server, storage, collator, NUM_DECODERS, BATCH),
        "memory_threads": arms.memory_threads(encoded, collator, NUM_DECODERS, BATCH),
        "s3_threads": arms.ours(storage, collator, NUM_DECODERS, BATCH, shuffle_lanes=LANES),
        "s3_processes": arms.ours(storage, collator, NUM_DECODERS, BATCH, shuffle_lanes=LANES, loader_kind="processes"),
        "s3_single_reads": arms.ours(storage, collator, NUM_DECODERS, BATCH, shuffle_block=1),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(num_turns + 1):
        # In another order each time, so that no arm always follows the same one.
        for name in list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]:
            for _ in itertools.islice(ways[name], READY):
                pass
            cpu_s, started = tree_cpu_s(), time.perf_counter()
            count = sum(len(batch) for batch in itertools.islice(ways[name], num_batches))
            rate, cpu_ms = count / (time.perf_counter() - started), 1000 * (tree_cpu_s() - cpu_s) / count
            logger.info("turn %d of %d: %s %.1f samples/s, %.2f CPU ms/sample", turn, num_turns, name, rate, cpu_ms)
            # The first turn starts processes and connections.
            if turn:
                rates[name].append(rate)
                work[name].append(cpu_ms)
    return rates, work, {"samples": num_samples, "mib": round(bytes_of_samples(storage) / 2**20), "films": "64 phantoms, repeated"}


def _ratio(rates: dict[str, list[float]], ours: str, other: str) -> float:
    return round(statistics.median(a / b for a, b in zip(rates[ours], rates[other], strict=True)), 3)


def _ratio_range(rates: dict[str, list[float]], ours: str, other: str) -> list[float]:
    values = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
    return [round(min(values), 3), round(max(values), 3)]


def _loading() -> dict[str, Any]:
    names = ("shuffle_block", "num_reader_threads", "prefetch_batches", "read_ahead_mb")
    return {"shuffle_lanes": LANES} | {name: getattr(DataConfig(), name) for name in names}


if __name__ == "__main__":
    sys.exit(run_benchmark("loader", measure, description=__doc__))
