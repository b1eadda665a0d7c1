"""Nothing lost: films are sent while replicas of the endpoint, the Serve controller and the gateway are killed with signal 9 at random.

A real Ray Serve endpoint (random weights: what it writes does not matter here), the real gateway process, and C-STORE on both sides. A film
that is not answered with Success is sent again, as an archive does. In the end each accepted film must have exactly one of each result.
Beside it an HTTP client asks without a pause, and repeats what was refused or broke off: none of its requests may fail in the end.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pydicom

from benchmarks.gateway_nodes import CALLER, Archive, GatewayProcess, free_port, running_archive, send
from benchmarks.http_client import HttpClient
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from serve.app import run_server
from serve.gateway.config import GatewayConfig
from serve.gateway.spool import read_status
from serve.settings import ServeSettings
from ssacl.config import load_config
from ssacl.data.tokenization import train_tokenizers
from ssacl.inference.generator import GenerationOptions
from ssacl.models.ssacl import SSACL
from ssacl.phantom import generate_study
from ssacl.phantom.dicom import dicom_bytes
from ssacl.training.checkpoint import save_model_folder

TARGETS = {
    "model replica": "ServeReplica:ssacl:model",
    "ingress replica": "ServeReplica:ssacl:ingress",
    "controller": "ServeController",
}
"""What is killed in the endpoint: its name here and in the title of its process."""
GATEWAY = "gateway"
RESULT_KINDS = ("SR", "OT", "SEG")
SEED = 20
KILL_EVERY_S = (0.5, 4.0)
GIVE_UP_S = 600.0
"""Without any film settled for so long, what is left is lost."""
GOALS = {
    "accepted_share": Goal(min=1.0),
    "lost": Goal(max=0),
    "doubled": Goal(max=0),
    "quarantined": Goal(max=0),
    "http.failed": Goal(max=0),
    "kinds_killed": Goal(min=len(TARGETS) + 1),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--films", type=int, help="sent in all (300; 20 with --quick)")
    parser.add_argument("--kills", type=int, help="processes killed in all (40; 8 with --quick)")


def measure(options: argparse.Namespace) -> Measurement:
    """Send, kill, wait until all is settled, and count.

    Raises
    ------
    ServeError
        Endpoint or gateway do not start.
    """
    num_films = options.films or (20 if options.quick else 300)
    num_kills = options.kills or (8 if options.quick else 40)
    with tempfile.TemporaryDirectory() as name:
        figures = chaos(Path(name), num_films, num_kills)
    return Measurement(figures=figures, goals=GOALS, config={"films": num_films, "kills": num_kills, "seed": SEED}, n=num_films)


def chaos(folder: Path, num_films: int, num_kills: int) -> dict[str, Any]:
    """The figures of one run in an empty folder."""
    settings = ServeSettings(
        checkpoint_url=str(random_model(folder / "model")),
        port=0,
        min_replicas=2,
        max_replicas=2,
        num_ingress_replicas=2,
        cpus_per_replica=0.3,
        num_threads=1,
        generation=GenerationOptions(num_beams=1, max_new_tokens=8),
    )
    archive_port = free_port()
    with running_archive(Archive(), archive_port) as archive, run_server(settings, blocking=False) as server:
        config = gateway_config(folder / "spool", f"{server.url}/v1/reports", archive_port)
        with GatewayProcess(folder, config) as gateway:
            started = time.monotonic()
            with killing(gateway, num_kills) as kills, HttpClient(config.endpoint.url, film(num_films)[1]) as client:
                # As long as there are kills, so that some meet a film on its way into the gateway.
                sent = send_all(config.port, num_films, every_s=sum(KILL_EVERY_S) / 2 * num_kills / num_films)
                sent_s = time.monotonic() - started
                # The last ones are killed while films are still being read.
                wait_for(kills.total, num_kills)
            wait_for(partial(settled, config.spool), len(sent["accepted"]))
            status = read_status(config.spool)
            settled_s = time.monotonic() - started
    found = archive.instances()
    studies = set(sent["accepted"])
    return {
        "films": num_films,
        "accepted_share": len(studies) / num_films,
        "lost": sum(not found.get((study, kind)) for study in studies for kind in RESULT_KINDS),
        "doubled": sum(len(instances) > 1 for instances in found.values()),
        "of_films_never_sent": len({study for study, _ in found} - studies),
        "quarantined": sum(status["quarantine"].values()),
        "reported": status["done"].get("reported", 0),
        "results_sent_again": len(archive.received) - sum(map(len, found.values())),
        "attempts": sent["attempts"],
        "http": client.figures(),
        "killed": dict(sorted(kills.items())),
        "kinds_killed": len(kills),
        "sending_s": round(sent_s, 1),
        "settled_s": round(settled_s, 1),
    }


def random_model(folder: Path, config_name: str = "phantom_tiny.yaml") -> Path:
    """A model folder of a shipped configuration, untrained; its vocabularies are those of a few phantom reports."""
    config = load_config(REPOSITORY / "configs" / config_name)
    tokenizers = train_tokenizers((generate_study(SEED, number, 64).report for number in range(40)), 400, 500)
    model = SSACL.from_config(config, tokenizers).eval()
    save_model_folder(folder, model, config, tokenizers, {}, {}, {"stages": ["contrastive", "generation", "findings"]})
    return folder


def gateway_config(spool: Path, endpoint_url: str, archive_port: int) -> GatewayConfig:
    """The defaults, but for waits that fit a run of minutes."""
    return GatewayConfig.model_validate(
        {
            "host": "127.0.0.1",
            "port": free_port(),
            "calling_ae": [CALLER],
            "spool": str(spool),
            "endpoint": {"url": endpoint_url},
            "destinations": {"archive": {"kind": "c-store", "host": "127.0.0.1", "port": archive_port, "ae_title": "ARCHIVE"}},
            "retry": {"first_s": 0.5, "longest_s": 5.0},
            "limits": {"min_free_bytes": 0},
        }
    )


def send_all(port: int, num_films: int, every_s: float) -> dict[str, Any]:
    """Each film until it is answered with Success, with random pauses between them: the accepted studies, and how often was sent."""
    accepted, attempts, chance = [], 0, random.Random(SEED)
    end = time.monotonic() + GIVE_UP_S
    for number in range(num_films):
        study_uid, content = film(number)
        time.sleep(chance.expovariate(1 / every_s))
        while time.monotonic() < end:
            attempts += 1
            if send(port, content) == [0]:
                accepted.append(study_uid)
                end = time.monotonic() + GIVE_UP_S
                break
            time.sleep(0.2)
    return {"accepted": accepted, "attempts": attempts}


def film(number: int) -> tuple[str, bytes]:
    """Its study, and a DICOM file."""
    content, _ = dicom_bytes(generate_study(SEED, number))
    return str(pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True).StudyInstanceUID), content


@contextmanager
def killing(gateway: GatewayProcess, num_kills: int) -> Iterator[Counter[str]]:
    """Inside the block processes die, one after the other; gives what was killed, how often, as it comes."""
    chance, kills, stopped = random.Random(SEED), Counter[str](), threading.Event()

    def run() -> None:
        while kills.total() < num_kills and not stopped.wait(chance.uniform(*KILL_EVERY_S)):
            # In turn, in random order: each kind has its share, also in a short run.
            kinds = [kind for kind in (*TARGETS, GATEWAY) if kills[kind] == min(kills[other] for other in (*TARGETS, GATEWAY))]
            kind = chance.choice(kinds)
            if kind == GATEWAY:
                gateway.kill()
                gateway.restart()
            else:
                victims = processes(TARGETS[kind])
                if not victims:
                    continue
                chance.choice(victims).kill()
            kills[kind] += 1

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield kills
    finally:
        stopped.set()
        thread.join()


def processes(title: str) -> list[psutil.Process]:
    """Processes below this one whose title holds `title`: nobody else's Ray is touched."""
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def settled(spool: Path) -> int:
    """Films that the gateway is done with."""
    status = read_status(spool)
    return sum(status["done"].values()) + sum(status["quarantine"].values())


def wait_for(count: Callable[[], int], wanted: int) -> None:
    """Until there are as many, or there have been no more for long: what is missing then is counted, not waited for."""
    last, end = -1, 0.0
    while (now := count()) < wanted:
        if now != last:
            last, end = now, time.monotonic() + GIVE_UP_S
        if time.monotonic() > end:
            return
        time.sleep(0.2)


if __name__ == "__main__":
    raise SystemExit(run_benchmark("gateway_chaos", measure, add_arguments, description=__doc__))
