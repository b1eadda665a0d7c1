"""The endpoint under load: capacity, latency at shares of it, what overload does, replicas that come and go, start, and what Serve costs.

    python -m benchmarks.serve_load --save        # also draws docs/pictures/serve_scaling.png

A real Ray Serve application over HTTP on this machine, with a small model of random weights, reports of one length, and one torch
thread per replica. First ReportGenerator alone, then one replica: its capacity with clients that wait for their answers, then Poisson
arrivals that do not wait, at 0.5 to 1.5 times that capacity, with the latency target of an operator who allows 1.5 times of what a
report takes on an idle endpoint. Then replicas that come with a load that one cannot bear, and go when it is over, under the same target.
What Serve costs beside ReportGenerator is measured at the released size as well. Client, proxy, ingress and replicas share this machine's
cores; CPU seconds say who used them.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gateway_chaos import SEED, TARGETS, film, processes, random_model
from benchmarks.open_loop import Answer, closed_loop, open_loop, poisson_moments, seen
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from benchmarks.serve_scaling import draw, scaling
from ray_jobs.session import ray_session
from serve.app import run_server
from serve.settings import ServeSettings
from ssacl.data.dicom import read_picture
from ssacl.inference.generator import GenerationOptions, ReportGenerator

logger = logging.getLogger("serve_load")
PICTURE = REPOSITORY / "docs" / "pictures" / "serve_scaling.png"
NUM_FILMS = 8
LEVELS = (0.5, 0.8, 1.0, 1.5)
BASE, SMALL = "mimic_cxr_base.yaml", "phantom_tiny.yaml"
"""The released size, and that of everything but its overhead."""
IDLE = 0.15
"""Share of the capacity at which the endpoint counts as unloaded."""
TARGET = 1.5
"""Latency target, in p95s of the unloaded endpoint."""
GOALS = {
    "base.serve_overhead": Goal(max=0.10),
    "load_150.p95_of_unloaded": Goal(max=2.0),
    **{f"load_{round(100 * level)}.failed": Goal(max=0) for level in LEVELS},
    "scaling.failed": Goal(max=0),
    "scaling.replicas_at_end": Goal(min=1, max=1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, help="of each load (45; 8 with --quick)")
    parser.add_argument("--batch", type=int, default=4, help="most films that a replica reads at once (default 4)")
    parser.add_argument("--tokens", type=int, default=48, help="of every report (default 48)")
    parser.add_argument("--beams", type=int, default=3, help="of the search (default 3)")
    parser.add_argument("--replicas", type=int, default=2, help="most of them when they scale (default 2)")


def measure(options: argparse.Namespace) -> Measurement:
    """All parts in turn.

    Raises
    ------
    ServeError
        The endpoint does not start.
    """
    seconds = options.seconds or (8.0 if options.quick else 45.0)
    generation = GenerationOptions(num_beams=options.beams, max_new_tokens=options.tokens, min_new_tokens=options.tokens)
    films = [film(number)[1] for number in range(NUM_FILMS)]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        model, base = random_model(Path(name) / "model"), random_model(Path(name) / "base", BASE)
        settings = ServeSettings(
            checkpoint_url=str(model),
            port=0,
            num_threads=1,
            cpus_per_replica=0.5,
            max_batch_size=options.batch,
            generation=generation,
            upscale_delay_s=2.0,
            downscale_delay_s=10.0,
        )
        direct = [Direct(model, generation, films, options.batch, seconds / 4)]
        base_direct = [Direct(base, generation, films, options.batch, seconds / 4)]
        started = time.monotonic()
        with ray_session():
            figures["ray_start_s"] = round(time.monotonic() - started, 2)
            figures |= one_replica(settings, films, seconds)
            logger.info("replicas that come and go")
            # With the latency target, as it would run: what sheds load must not hide it from what adds replicas.
            scaled = settings.model_copy(update={"max_replicas": options.replicas, "latency_target_s": figures["latency_target_s"]})
            figures["scaling"], timeline = scaling(scaled, films, LEVELS[-1] * figures["capacity_per_s"], seconds)
            logger.info("the released size")
            # Its heaviest part is the model: three times the other loads' time gives dozens of reports on two cores.
            figures["base"] = saturated(settings.model_copy(update={"checkpoint_url": str(base)}), films, 3 * seconds)
        # Before and after, as this machine may have become faster or slower meanwhile.
        direct.append(Direct(model, generation, films, options.batch, seconds / 4))
        base_direct.append(Direct(base, generation, films, options.batch, seconds / 4))
    figures |= overhead(direct, figures["capacity_per_s"], options.batch)
    figures["base"] |= overhead(base_direct, figures["base"]["capacity_per_s"], options.batch)
    if options.save:
        draw(timeline, PICTURE)
    config = {
        "model": f"configs/{SMALL}, random weights",
        "base": f"configs/{BASE}, random weights, the small model's vocabularies",
        "tokens": options.tokens,
        "num_beams": options.beams,
        "max_batch_size": options.batch,
        "torch_threads_per_replica": 1,
        "latency_target": f"{TARGET} x p95 of the unloaded endpoint",
        "seconds_of_each_load": seconds,
        "most_replicas": options.replicas,
        "shared": "client, proxy, ingress and replicas share the cores",
        "seed": SEED,
    }
    goals = {**GOALS, "scaling.most_replicas": Goal(min=options.replicas)}
    key = f"direct_batch_{options.batch}_per_s"
    spread = {key: [each.rates[options.batch] for each in direct], f"base_{key}": [each.rates[options.batch] for each in base_direct]}
    return Measurement(
        figures, goals, config, n=sum(figures[name]["requests"] for name in figures if name.startswith("load_")), spread=spread
    )


class Direct:
    """ReportGenerator alone, in this process: reports a second by batch size."""

    def __init__(self, model: Path, generation: GenerationOptions, films: Sequence[bytes], most: int, seconds: float) -> None:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        generator = ReportGenerator.load(model)
        pictures = [read_picture(content) for content in films]
        self.rates: dict[int, float] = {}
        for size in [size for size in (1, 2, 4, 8) if size < most] + [most]:
            options = generation.model_copy(update={"max_batch_size": size})
            batch = (pictures * most)[:size]
            generator.generate(batch, options)
            took_s: list[float] = []
            while sum(took_s) < seconds:
                started = time.perf_counter()
                generator.generate(batch, options)
                took_s.append(time.perf_counter() - started)
            self.rates[size] = round(size / statistics.median(took_s), 3)
            logger.info("direct, batches of %d: %.2f reports/s", size, self.rates[size])
        torch.set_num_threads(threads)


def overhead(direct: Sequence[Direct], capacity_per_s: float, batch: int) -> dict[str, Any]:
    """What Serve takes on top of ReportGenerator alone, as a share of that."""
    rates = {f"batch_{size}_per_s": round(statistics.mean(each.rates[size] for each in direct), 4) for size in direct[0].rates}
    return {"direct": rates, "serve_overhead": round(rates[f"batch_{batch}_per_s"] / capacity_per_s - 1, 4)}


def saturated(settings: ServeSettings, films: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Reports a second of one replica whose clients wait for their answers, and what its processes used for a report."""
    with run_server(settings, blocking=False) as server:
        return _saturated(f"{server.url}/v1/reports", films, settings.max_batch_size, seconds)


def _saturated(url: str, films: Sequence[bytes], batch: int, seconds: float) -> dict[str, Any]:
    asyncio.run(closed_loop(url, films, batch, 3.0))
    before = cpu_seconds()
    full = seen(asyncio.run(closed_loop(url, films, 3 * batch, seconds)))
    used = {name: round((spent - before.get(name, 0.0)) / full["requests"], 4) for name, spent in cpu_seconds().items()}
    logger.info("capacity: %.2f reports/s; CPU seconds of a report: %s", full["answered_per_s"], used)
    return {"capacity_per_s": full["answered_per_s"], "cpu_s_per_report": used}


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far of what takes part in an answer: this client, and Serve's proxy, ingress and model replicas."""
    titles = {"proxy": "ProxyActor", "ingress": TARGETS["ingress replica"], "model": TARGETS["model replica"]}
    parts = {"client": [psutil.Process()], **{name: processes(title) for name, title in titles.items()}}
    return {name: sum(sum(process.cpu_times()[:2]) for process in found) for name, found in parts.items()}


def one_replica(settings: ServeSettings, films: Sequence[bytes], seconds: float) -> dict[str, Any]:
    """Start, capacity, the unloaded endpoint, and every level of load."""
    figures: dict[str, Any] = {}
    started = time.monotonic()
    with run_server(settings, blocking=False) as server:
        figures["cold_start_s"] = round(time.monotonic() - started, 2)
        url = f"{server.url}/v1/reports"
        figures |= _saturated(url, films, settings.max_batch_size, seconds)
        capacity = figures["capacity_per_s"]
        figures["unloaded"] = unloaded = seen(_poisson(url, films, IDLE * capacity, 2 * seconds))
        logger.info("unloaded: %s", unloaded)
    target_s = round(TARGET * unloaded["p95_s"], 3)
    figures["latency_target_s"] = target_s
    with run_server(settings.model_copy(update={"latency_target_s": target_s}), blocking=False) as server:
        url = f"{server.url}/v1/reports"
        asyncio.run(closed_loop(url, films, settings.max_batch_size, 3.0))
        for level in LEVELS:
            row = seen(_poisson(url, films, level * capacity, seconds))
            row["offered_per_s"] = round(level * capacity, 3)
            row["p95_of_unloaded"] = round(row["p95_s"] / unloaded["p95_s"], 3)
            figures[f"load_{round(100 * level)}"] = row
            logger.info("%.1f of the capacity: %s", level, row)
    return figures


def _poisson(url: str, films: Sequence[bytes], rate_per_s: float, seconds: float) -> list[Answer]:
    return asyncio.run(open_loop(url, films, poisson_moments(rate_per_s, seconds, SEED)))


if __name__ == "__main__":
    sys.exit(run_benchmark("serve_load", measure, add_arguments, description=__doc__.splitlines()[0]))
