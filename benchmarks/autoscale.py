"""Nodes that come and go: a cluster with no node but its head, a training run, then the endpoint under load, and what becomes of the nodes.

Ray's own autoscaler with its provider for one machine (`FakeMultiNodeProvider`): each node is a real raylet. The load is small and of this
machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from benchmarks.cluster_jobs import stages_of
from benchmarks.cluster_place import wait_for
from benchmarks.cluster_serving import answers, replicas, serve_file
from benchmarks.phantom_data import NOBODYS_KEY
from benchmarks.raylets import BIN, LocalCluster
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from benchmarks.steady_client import SteadyClient
from serve.access_keys import add_key
from ssacl.data.convert import IngestSettings
from ssacl.data.corpus import train_dataset_tokenizers
from ssacl.data.ingest import run_local
from ssacl.phantom import generate_study, write_dicom_tree
from ssacl.phantom.dicom import dicom_bytes

IDLE_S = 10.0
"""A node that nobody uses goes after so long; a cluster's own is minutes."""
MAX_NODES = 2
LOAD, TOKENS = 1.5, 100
"""Of what one replica answers; of every report."""
GOALS = {
    "training.most_nodes": Goal(min=MAX_NODES, max=MAX_NODES),
    "training.nodes_after": Goal(max=0),
    "serving.nodes_before_load": Goal(max=1),
    "serving.most_nodes": Goal(min=MAX_NODES, max=MAX_NODES),
    "serving.failed": Goal(max=0),
    "serving.nodes_after": Goal(max=0),
}


def measure(options: argparse.Namespace) -> Measurement:
    with tempfile.TemporaryDirectory(prefix="ssacl-autoscale-") as name:
        figures = autoscaled(Path(name))
    return Measurement(figures, GOALS, {"idle_s": IDLE_S, "max_nodes": MAX_NODES, "cpus_per_node": 1})


def autoscaled(work: Path) -> dict[str, Any]:
    """The figures of one round in an empty folder."""
    write_dicom_tree(work / "studies", 16, seed=3, size_px=96, num_processes=1)
    run_local("dicom-dir", work / "studies", str(work / "films"), IngestSettings(key_secret=NOBODYS_KEY))
    train_dataset_tokenizers(str(work / "films"), None, 1000, 1000)
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with LocalCluster(variables) as cluster:
        path = work / "autoscaler.yaml"
        path.write_text(yaml.safe_dump(autoscaler_config(cluster.gcs)), encoding="utf-8")
        head = cluster.start_head(options=[f"--autoscaling-config={path}"])
        figures: dict[str, Any] = {}
        with counting(cluster) as counts:
            figures["training"] = train(cluster, work, counts)
        print(f"autoscale: {figures}", file=sys.stderr)
        with counting(cluster) as counts:
            figures["serving"] = load(cluster, work, head, counts)
    return figures


def autoscaler_config(gcs: str) -> dict[str, Any]:
    """A head without CPUs, and up to `MAX_NODES` nodes of one CPU."""
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": 100 << 20},
            "node_config": {},
            "min_workers": 0,
            "max_workers": MAX_NODES,
        },
    }
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "rsync_exclude", "rsync_filter")
    lists += ("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")
    return {
        "cluster_name": "ssacl-autoscale",
        "max_workers": MAX_NODES,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            # By its own name: Ray's wheels lack the file of defaults that its type asks for.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": kinds,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }


@contextmanager
def counting(cluster: LocalCluster) -> Iterator[list[tuple[float, int]]]:
    """Gives times of the monotonic clock and the nodes beside the head, as they are seen inside the block."""
    counts: list[tuple[float, int]] = []
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(0.5):
            try:
                counts.append((time.monotonic(), len(cluster.alive()) - 1))
            except (OSError, ValueError, KeyError):
                continue

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield counts
    finally:
        stopped.set()
        thread.join()


def train(cluster: LocalCluster, work: Path, counts: list[tuple[float, int]]) -> dict[str, Any]:
    """A run of two train workers on a cluster that has room for none.

    Its driver is a process of its own, no submitted job: the provider's nodes share the head's folder, and each unpacks a job's package
    there anew, under the feet of the job.
    """
    changes = [
        f"data.url={work / 'films'}",
        f"run.storage_url={work / 'runs'}",
        "run.name=grown",
        f"run.stages={json.dumps(stages_of(4, 4))}",
    ]
    changes += ["run.num_train_workers=2", "run.node_wait_s=120", "engine.kind=torch", "engine.micro_batch_size=2"]
    started = time.monotonic()
    command = [
        str(BIN / "ssacl"),
        "train",
        "--address",
        cluster.gcs,
        "--config",
        str(REPOSITORY / "configs" / "phantom_tiny.yaml"),
        *changes,
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    subprocess.run(command, cwd=work, env=environment, check=True, stdout=sys.stderr, timeout=300)
    ended = time.monotonic()
    gone_s = seconds_until_no_node(cluster)
    return {**of_nodes(counts, started), "run_s": round(ended - started, 1), "nodes_gone_after_s": gone_s, "nodes_after": counts[-1][1]}


def load(cluster: LocalCluster, work: Path, head: Any, counts: list[tuple[float, int]]) -> dict[str, Any]:
    """The endpoint with one model replica to a node, under more requests than one replica answers in time."""
    key = add_key(work / "keys.json", "benchmark", ["reports:write"])
    path = serve_file(work, head.proxy_port)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    tree["proxy_location"] = "HeadOnly"
    tree["applications"][0]["args"] |= {
        "checkpoint_url": str(work / "runs" / "grown" / "model"),
        "min_replicas": 1,
        "max_replicas": MAX_NODES,
        "num_ingress_replicas": 1,
        "cpus_per_replica": 0.8,
        "max_batch_size": 1,
        "upscale_delay_s": 2,
        "downscale_delay_s": 5,
        "generation": {"num_beams": 3, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS},
    }
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    started = time.monotonic()
    subprocess.run([BIN / "serve", "deploy", path, "--address", cluster.dashboard], env=environment, check=True, stdout=sys.stderr)
    wait_for("the endpoint", lambda: replicas(cluster) == 1 and answers(head))
    first_s, before = time.monotonic() - started, counts[-1][1]
    film = dicom_bytes(generate_study(3, 0, 96))[0]
    url, allowed = f"http://127.0.0.1:{head.proxy_port}/v1/reports", f"Bearer {key}"
    alone_s = seconds_alone(url, film, allowed)
    asked = time.monotonic()
    with SteadyClient(url, film, allowed, every_s=alone_s / LOAD) as client:
        wait_for("a second replica", lambda: replicas(cluster) == MAX_NODES)
        second_s = time.monotonic() - asked
        time.sleep(5)
    answered = client.figures(asked, time.monotonic())
    wait_for("one replica again", lambda: replicas(cluster) == 1)
    subprocess.run([BIN / "serve", "shutdown", "-y", "--address", cluster.dashboard], env=environment, check=True, stdout=sys.stderr)
    gone_s = seconds_until_no_node(cluster)
    return {
        **of_nodes(counts, started),
        **answered,
        # 503 is how the endpoint says that it is full.
        "failed": sum(count for answer, count in answered["answers"].items() if answer not in ("200", "503")),
        "first_answer_s": round(first_s, 1),
        "report_alone_s": round(alone_s, 3),
        "nodes_before_load": before,
        "second_replica_s": round(second_s, 1),
        "nodes_gone_after_s": gone_s,
        "nodes_after": counts[-1][1],
    }


def seconds_alone(url: str, film: bytes, authorization: str) -> float:
    """What a report takes on an idle replica."""
    headers, took_s = {"content-type": "application/dicom", "authorization": authorization}, []
    for _ in range(8):
        started = time.monotonic()
        requests.post(url, film, headers=headers, timeout=60).raise_for_status()
        took_s.append(time.monotonic() - started)
    return statistics.median(took_s)


def seconds_until_no_node(cluster: LocalCluster) -> float:
    started = time.monotonic()
    wait_for("the nodes to go", lambda: len(cluster.alive()) == 1)
    # The counter looks twice a second.
    time.sleep(1.5)
    return round(time.monotonic() - started - 1.5, 1)


def of_nodes(counts: list[tuple[float, int]], started: float) -> dict[str, Any]:
    """The most nodes there were, and seconds until the first and the last of them."""
    most = max(number for _, number in counts)
    first = next((at for at, number in counts if number), started)
    full = next((at for at, number in counts if number == most), started)
    return {"most_nodes": most, "first_node_s": round(first - started, 1), "all_nodes_s": round(full - started, 1)}


if __name__ == "__main__":
    sys.exit(run_benchmark("autoscale", measure, description=__doc__))
