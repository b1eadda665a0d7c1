"""The endpoint on a cluster of several nodes, by the commands of docs/OPERATIONS.md, while models change and a node and the head are lost.

A head with Redis and two more nodes, all real raylets of this machine, and a model registry on a real S3 server; a proxy on every node, and
a client that keeps asking the one of a node that stays. Needs redis-server (make setup-servers).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import yaml

from benchmarks.cluster_place import Place, started_place, wait_for
from benchmarks.gateway_chaos import random_model
from benchmarks.raylets import LocalCluster, Node
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from benchmarks.steady_client import SteadyClient
from ssacl.errors import ClusterError
from ssacl.phantom import generate_study
from ssacl.phantom.dicom import dicom_bytes

QUIET_S = 10.0
"""Asking before and between faults."""
AWAY_S = 5.0
"""A head is started again after so long."""
SAME = 10
"""So many reports in a row by one version: all replicas have it."""
GOALS = {
    "quiet.answered_share": Goal(min=1.0),
    "promoted.answered_share": Goal(min=1.0),
    "rolled_back.answered_share": Goal(min=1.0),
    "worker_lost.answered_share": Goal(min=0.9),
    "head_lost.answered_share": Goal(min=0.99),
    "head_lost.jobs_kept": Goal(min=1, max=1),
}


def measure(options: argparse.Namespace) -> Measurement:
    quiet_s = QUIET_S if options.quick else 3 * QUIET_S
    with tempfile.TemporaryDirectory(prefix="ssacl-cluster-") as name, started_place(Path(name)) as place:
        with place.phase("release"):
            release(place)
        with place.phase("faults"):
            figures = faults(place, quiet_s)
    figures |= {"phases_s": place.phases_s, "commands": place.book.transcript}
    return Measurement(figures, GOALS, {"nodes": 3, "replicas": 2, "quiet_s": quiet_s, "away_s": AWAY_S, "asked_every_s": 0.5})


def release(place: Place) -> None:
    """Keys, a version of an untrained model, its way to @stable."""
    book = place.book
    book.run("ssacl model keys")
    book.environment["SSACL_MODEL_SIGNING_KEY"] = str(place.folder / "signing.pem")
    book.environment["SSACL_MODEL_PUBLIC_KEY"] = str(place.folder / "signing.pub")
    register(place)
    book.run("ssacl model promote s3://bucket/models @canary --channel stable")
    book.run("ssacl model verify")
    book.run("ssacl model list")
    book.run("ssacl checkpoint show")


def register(place: Place) -> None:
    """A version of a model of new random weights, at @canary."""
    trained = place.s3.folder / "ssacl" / "runs" / "mimic_cxr_base" / "model"
    shutil.rmtree(trained, ignore_errors=True)
    trained.parent.mkdir(parents=True, exist_ok=True)
    random_model(trained)
    version = place.book.run("ssacl model register").partition("version: ")[2].split()[0]
    place.book.run("ssacl model promote s3://bucket/models 0123456789ab", names={"0123456789ab": version})


def faults(place: Place, quiet_s: float) -> dict[str, Any]:
    """Deploy `cluster/serve.yaml`; change its model and change back; lose a node, then the head, and start that again."""
    cluster, head, (kept, other) = place.cluster, place.head, place.workers
    key = place.book.run("ssacl access add").split()[-1]
    started = time.monotonic()
    place.book.run("serve deploy", names={"cluster/serve.yaml": str(serve_file(place.folder, head.proxy_port))})
    wait_for("the endpoint", lambda: replicas(cluster) == 2 and all(answers(node) for node in (head, kept, other)))
    figures: dict[str, Any] = {"deployed_s": round(time.monotonic() - started, 1)}
    # Without data it ends with an error: a job that a new head is to know of.
    place.book.run("ssacl submit evaluate", expect=1)
    film = dicom_bytes(generate_study(3, 0, 96))[0]
    windows: dict[str, tuple[float, float]] = {}
    with SteadyClient(f"http://127.0.0.1:{kept.proxy_port}/v1/reports", film, f"Bearer {key}") as client:
        quiet = time.monotonic()
        time.sleep(quiet_s)
        windows["quiet"] = quiet, time.monotonic()
        events: dict[str, Callable[[], dict[str, Any]]] = {
            "promoted": lambda: promote(place, client),
            "rolled_back": lambda: roll_back(place, client),
            "worker_lost": lambda: lose_worker(place),
            "head_lost": lambda: lose_head(place),
        }
        for name, event in events.items():
            started = time.monotonic()
            figures[name] = event()
            time.sleep(quiet_s)
            windows[name] = started, time.monotonic()
            print(f"cluster: {name} {figures[name]}", file=sys.stderr)
    # Once the last request has its answer: one that hangs counts too.
    return figures | {name: figures.get(name, {}) | client.figures(*window) for name, window in windows.items()}


def promote(place: Place, client: SteadyClient) -> dict[str, float]:
    """Another model to @stable."""
    register(place)
    return change(client, lambda: place.book.run("ssacl model promote s3://bucket/models @canary --channel stable"))


def roll_back(place: Place, client: SteadyClient) -> dict[str, float]:
    """The model before it."""
    return change(client, lambda: place.book.run("ssacl model rollback"))


def change(client: SteadyClient, command: Callable[[], object]) -> dict[str, float]:
    """Seconds from the command until another model writes all reports."""
    before, started = client.versions(SAME), time.monotonic()
    command()
    wait_for("reports of another version", lambda: len(now := client.versions(SAME)) == 1 and now != before)
    return {"all_changed_s": round(time.monotonic() - started, 1)}


def lose_worker(place: Place) -> dict[str, float]:
    """Lose the node that the client does not ask; seconds until the head knows, and until both model replicas run again."""
    cluster, lost = place.cluster, place.workers[1]
    lost_at = time.monotonic()
    lost.lose()
    wait_for("the head to see that the node is lost", lambda: lost.ip not in cluster.alive())
    noticed_s = time.monotonic() - lost_at
    wait_for("two model replicas", lambda: replicas(cluster) == 2)
    return {"noticed_s": round(noticed_s, 1), "replicas_again_s": round(time.monotonic() - lost_at, 1)}


def lose_head(place: Place) -> dict[str, float]:
    """Lose the head, start it again on the same Redis; seconds until its Jobs API answers, and until it has node, endpoint and proxy."""
    cluster, kept = place.cluster, place.workers[0]
    jobs = {job["submission_id"] for job in cluster.ask("/api/jobs/").json()}
    place.head.lose()
    time.sleep(AWAY_S)
    again = time.monotonic()
    place.head = cluster.start_head()
    api_s = time.monotonic() - again
    wait_for("the node that is left", lambda: kept.ip in cluster.alive())
    wait_for("the endpoint under the new head", lambda: replicas(cluster) == 2 and answers(place.head))
    whole_s = time.monotonic() - again
    kept_jobs = {job["submission_id"] for job in cluster.ask("/api/jobs/").json()} >= jobs
    return {"jobs_api_s": round(api_s, 1), "whole_s": round(whole_s, 1), "jobs_kept": int(kept_jobs)}


def serve_file(work: Path, port: int) -> Path:
    """The shipped file for a small machine: no GPU, shares of a CPU, short reports."""
    tree = yaml.safe_load((REPOSITORY / "cluster" / "serve.yaml").read_text(encoding="utf-8").replace("BUCKET", "ssacl"))
    tree["http_options"] = {"host": "127.0.0.1", "port": port}
    small = {"max_replicas": 2, "follow_s": 5, "cpus_per_replica": 0.3, "gpus_per_replica": 0, "num_threads": 1, "max_batch_size": 4}
    small |= {"generation": {"num_beams": 1, "max_new_tokens": 8}, "service": {"access": {"keys_file": str(work / "keys.json")}}}
    tree["applications"][0]["args"] |= small
    path = work / "serve.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def replicas(cluster: LocalCluster) -> int:
    """Model replicas that run on living nodes, while the application is taken to be well; 0 otherwise.

    Raises
    ------
    ClusterError
        Serve has given the application up; its reason is told.
    """
    try:
        alive = cluster.alive()
        application = cluster.ask("/api/serve/applications/").json()["applications"]["ssacl"]
    except (requests.RequestException, ValueError, KeyError):
        return 0
    if application["status"] == "DEPLOY_FAILED":
        raise ClusterError(f"The application was not deployed: {application['message']}")
    found = application["deployments"]["model"]["replicas"]
    running = [replica for replica in found if replica["state"] == "RUNNING" and replica["node_ip"] in alive]
    return len(running) if application["status"] == "RUNNING" else 0


def answers(node: Node) -> bool:
    """Whether the node's proxy has a model behind it."""
    try:
        return requests.get(f"http://127.0.0.1:{node.proxy_port}/readyz", timeout=5).ok
    except requests.RequestException:
        return False


if __name__ == "__main__":
    sys.exit(run_benchmark("cluster_serving", measure, description=__doc__))
