"""The endpoint under load: throughput and latency, what is shed, replicas that come and go, cold start, and what Serve adds.

    python -m benchmarks.serve_load                 # about 9 minutes on two cores; with --save also the timeline as a picture
    python -m benchmarks.serve_load --quick         # does everything run?

A small random model of the released form writes reports of a fixed length, so that every request is the same work. The batch size is the
smallest that has 95 % of the best throughput of `ReportGenerator` called directly. Capacity is what the endpoint does when it is never idle
and nothing is shed. Then requests come at random moments (Poisson), at shares of that capacity, sent whether or not others are answered.
The latency target is 1.8 times what a request takes alone: with it, more than that is shed with 503.
"""

from __future__ import annotations

import argparse
import io
import logging
import statistics
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.load_client import Client, Load, percentiles_ms
from benchmarks.record import RESULTS, Goal, Measurement, run_benchmark
from benchmarks.train_step import SIZES
from ssacl.anatomy import FINDINGS
from ssacl.config import parse_config
from ssacl.data.dicom import Picture, read_picture
from ssacl.data.tokenization import train_tokenizers
from ssacl.inference.generator import GenerationOptions, ReportGenerator
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import save_model_folder

logger = logging.getLogger("serve_load")
SHARES = (0.5, 0.8, 1.0, 1.5)
BATCHES = (1, 2, 4, 8)
WORDS = "The lungs are clear. No pneumothorax or pleural effusion is seen. The heart size is normal. The bones are intact."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="of each load (default 60; 6 with --quick)")
    parser.add_argument("--tokens", type=int, default=40, help="of each report (default 40)")
    parser.add_argument("--max-replicas", type=int, default=2, help="of the timeline (default 2)")


def measure(options: argparse.Namespace) -> Measurement:
    """One endpoint after another in one Ray session.

    Raises
    ------
    SSACLError
        The endpoint does not start.
    """
    import torch

    from serve.app import run_server
    from serve.settings import ServeSettings

    torch.set_num_threads(1)
    seconds = options.seconds or (6.0 if options.quick else 60.0)
    generation = GenerationOptions(max_new_tokens=options.tokens, min_new_tokens=options.tokens)
    films = [_film(seed) for seed in range(8)]
    with tempfile.TemporaryDirectory(prefix="ssacl-load-") as folder:
        model = _model(Path(folder) / "model")
        generator = ReportGenerator.load(model)
        pictures = [read_picture(film, "film") for film in films]
        by_batch = {batch: _direct(generator, pictures, batch, generation, seconds / 10) for batch in BATCHES}
        batch = next(size for size, rate in by_batch.items() if rate >= 0.95 * max(by_batch.values()))
        logger.info("reports a second by batch: %s; batches of %d", by_batch, batch)
        settings = ServeSettings(
            checkpoint_url=str(model), port=0, num_threads=1, max_batch_size=batch, max_queued_requests=512, generation=generation
        )
        started = time.monotonic()
        with run_server(settings, blocking=False) as server:
            client = Client(server.url, films)
            client.one_by_one(1)
            cold_start_s = time.monotonic() - started
            alone = client.one_by_one(5 if options.quick else 30)
            direct, served = [], []
            for _ in range(1 if options.quick else 3):
                direct.append(_direct(generator, pictures, batch, generation, seconds / 4))
                # The first answers come while batches still fill.
                served.append(client.saturated(3 * batch, seconds / 4))
            capacity = statistics.median(len(load.accepted_s) / load.seconds for load in served)
            alone_s = float(np.percentile(alone.accepted_s, 95))
            _deploy(settings.model_copy(update={"latency_target_s": 1.8 * alone_s}))
            # The limit has learned before it is measured.
            client.poisson(capacity, seconds / 4)
            loads = {share: client.poisson(share * capacity, seconds, seed=round(10 * share)) for share in SHARES}
            timeline = _timeline(settings, client, capacity, seconds, options.max_replicas)
    picture = _draw(timeline, capacity, options.save)
    figures: dict[str, Any] = {
        "direct_reports_per_s_by_batch": by_batch,
        "batch": batch,
        "cold_start_s": round(cold_start_s, 2),
        "alone": percentiles_ms(alone.accepted_s),
        "capacity_reports_per_s": round(capacity, 3),
        "direct_reports_per_s": round(statistics.median(direct), 3),
        "serve_overhead": round(1 - capacity / statistics.median(direct), 4),
        "loads": {str(share): load.figures() for share, load in loads.items()},
        "overload_p95_times_alone": _ratio(loads[SHARES[-1]], alone_s),
        "shed_all_with_retry_after": all(load.figures()["shed_with_retry_after"] for load in loads.values()),
        "failed": sum(load.figures()["failed"] for load in [alone, *served, *loads.values()]),
        "replicas": {"first": timeline[0][1], "most": max(count for _, count in timeline), "last": timeline[-1][1], "picture": picture},
    }
    goals = {"failed": Goal(max=0), "replicas.most": Goal(min=options.max_replicas), "replicas.last": Goal(max=1)}
    if not options.quick:
        goals |= {"serve_overhead": Goal(max=0.1), "overload_p95_times_alone": Goal(max=2.0)}
    config = {"model": "small, random weights", "seconds": seconds, "generation": generation.model_dump(), "threads_per_replica": 1}
    spread = {"direct_reports_per_s": [round(min(direct), 3), round(max(direct), 3)]}
    return Measurement(figures, goals, config=config, n=len(direct), spread=spread)


def _model(folder: Path) -> Path:
    import torch

    config = parse_config({"model": SIZES["small"]})
    tokenizers = train_tokenizers([WORDS, ", ".join(FINDINGS)] * 20, text_vocab_size=400, lm_vocab_size=500)
    torch.manual_seed(0)
    model = SSACL.from_config(config, tokenizers).eval()
    save_model_folder(folder, model, config, tokenizers, dict.fromkeys(FINDINGS, 0.5), {}, {"stages": ["joint", "findings"]})
    return folder


def _film(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (512, 512), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _direct(generator: ReportGenerator, pictures: list[Picture], batch: int, options: GenerationOptions, seconds: float) -> float:
    """Reports a second of the generator itself."""
    rows = [pictures[place % len(pictures)] for place in range(batch)]
    options = options.model_copy(update={"max_batch_size": batch})
    generator.generate(rows, options)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds or not count:
        generator.generate(rows, options)
        count += batch
    return round(count / (time.perf_counter() - started), 3)


def _deploy(settings: Any) -> None:
    from ray import serve

    from serve.app import APPLICATION, build_app

    serve.run(build_app(settings), name=APPLICATION, route_prefix="/")


def _timeline(settings: Any, client: Client, capacity: float, seconds: float, most: int) -> list[tuple[float, int]]:
    """(seconds, running model replicas) while load comes and goes."""
    _deploy(settings.model_copy(update={"max_replicas": most, "upscale_delay_s": 2.0, "downscale_delay_s": 8.0, "cpus_per_replica": 0.5}))
    seen: list[tuple[float, int]] = []
    over = threading.Event()
    begun = time.monotonic()

    def watch() -> None:
        while not over.is_set():
            seen.append((round(time.monotonic() - begun, 2), _running_replicas()))
            over.wait(0.5)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        client.poisson(0.1 * capacity, seconds / 6)
        end = time.monotonic() + 90
        while max(count for _, count in seen) < most and time.monotonic() < end:
            client.poisson(1.5 * capacity, max(5.0, seconds / 3))
        end = time.monotonic() + 90
        while seen[-1][1] > 1 and time.monotonic() < end:
            client.poisson(0.1 * capacity, 5.0)
    finally:
        over.set()
        watcher.join(10)
    return seen


def _running_replicas() -> int:
    from ray import serve

    from serve.app import APPLICATION

    deployment = serve.status().applications[APPLICATION].deployments["model"]
    return int(deployment.replica_states.get("RUNNING", 0))


def _draw(timeline: list[tuple[float, int]], capacity: float, save: bool) -> str:
    """The name of the picture in benchmarks/results/; "" where it is not kept."""
    if not save:
        return ""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3))
    axes.step(*zip(*timeline, strict=True), where="post")
    axes.set(xlabel="seconds", ylabel="running model replicas", title=f"0.1, then 1.5, then 0.1 times {capacity:.1f} reports/s")
    axes.set_ylim(0, None)
    name = f"{datetime.now(UTC):%Y-%m-%d}-serve_load.png"
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / name, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return name


def _ratio(load: Load, alone_s: float) -> float | None:
    return round(float(np.percentile(load.accepted_s, 95)) / alone_s, 3) if load.accepted_s else None


if __name__ == "__main__":
    sys.exit(run_benchmark("serve_load", measure, add_arguments, description=__doc__.splitlines()[0]))
