"""Jobs on a real Ray head: real work with secrets that never leave it, exit codes, jobs that fit nowhere, stopping."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import requests
import yaml
from ray_head import ray_head
from training_set import tiny_tree, write_training_set
from watched_metrics import watched

from benchmarks.cluster_place import wait_for
from benchmarks.cluster_serving import answers, replicas, serve_file
from benchmarks.raylets import LocalCluster, Node
from serve.access_keys import add_key
from ssacl.cli import main
from ssacl.data.shards import ShardIndex
from ssacl.data.storage import EmbeddedS3, embedded_s3, open_storage
from ssacl.phantom import write_dicom_tree

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.external]
NUM_STUDIES = 4


@dataclass(frozen=True)
class Place:
    cluster: LocalCluster
    head: Node
    s3: EmbeddedS3
    studies: Path
    key_file: Path
    planted: dict[str, str]
    """What must stand in no log, no job record and no environment that Ray lists."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("submit")
    write_dicom_tree(folder / "studies", NUM_STUDIES, seed=3, size_px=64, num_processes=1)
    key_file = folder / "key"
    key_file.write_text(f"{secrets.token_hex(16)}\n")
    with embedded_s3(folder / "s3") as s3:
        node = {name: value for name, value in s3.environment.items() if name != "AWS_ENDPOINT_URL"}
        planted = {"key": key_file.read_text().strip(), "s3": s3.secret_key}
        # Ray's own ten seconds are longer than the runs here.
        with ray_head({**node, "RAY_metrics_report_interval_ms": "1000"}, "--num-gpus=1") as (cluster, head):
            yield Place(cluster, head, s3, folder / "studies", key_file, planted)


@pytest.fixture(autouse=True)
def _token(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", place.cluster.token)


def submit(place: Place, job: str, *options: str, command: tuple[str, ...]) -> int:
    return main(["submit", job, "--address", place.cluster.dashboard, *options, "--", *command])


def test_ingest_runs_as_a_job_and_its_secrets_stay_where_they_are(
    place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--secret", "AWS_ACCESS_KEY_ID", "--secret", "AWS_SECRET_ACCESS_KEY", "--secret", f"SSACL_KEY_SECRET={place.key_file}"]
    options += ["--env", f"AWS_ENDPOINT_URL={place.s3.endpoint_url}", "--name", "first-ingest"]
    command = ("--format", "dicom-dir", str(place.studies), "--out", "s3://ssacl/films", "--num-workers", "1")
    assert submit(place, "ingest", *options, command=command) == 0
    out, err = capfd.readouterr()
    assert "job: first-ingest" in out
    assert str(NUM_STUDIES) in out
    assert "first-ingest: done" in err
    for name, value in place.s3.environment.items():
        monkeypatch.setenv(name, value)
    index = ShardIndex.load(open_storage("s3://ssacl/films"))
    assert sum(shard.count for shard in index.shards) == NUM_STUDIES
    listed = place.cluster.ask("/api/jobs/first-ingest").json()
    assert str(place.key_file) in json.dumps(listed["runtime_env"])
    told = {path: path.read_bytes() for path in place.cluster.folder.rglob("*") if path.is_file() and not path.is_symlink()}
    told[Path("job")] = json.dumps(listed).encode()
    told[Path("output")] = (out + err).encode()
    assert any(b"SSACL_SECRETS" in content for content in told.values()), "the logs hold what a runtime environment says"
    for name, value in place.planted.items():
        assert [path.name for path, content in told.items() if value.encode() in content] == [], name


def test_exit_codes_missing_secrets_and_what_is_told_of_a_job(
    place: Place, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = ("reports", "--pairs", str(tmp_path / "absent.jsonl"), "--out", str(tmp_path / "out"))
    options = ["--name", "no-secret", "--secret", "NOT_GIVEN"]
    assert submit(place, "evaluate", *options, command=evaluation) == 1
    assert "ssacl: The secret NOT_GIVEN is not in the environment" in capfd.readouterr().out
    assert main(["submit", "status", "--address", place.cluster.dashboard]) == 0
    assert "no-secret  FAILED" in (told := capfd.readouterr().out)
    assert "exit 1" in told
    assert main(["submit", "logs", "no-secret", "--address", place.cluster.dashboard]) == 0
    assert "NOT_GIVEN" in capfd.readouterr().out
    assert submit(place, "evaluate", *options, command=evaluation) == 1
    assert "no-secret" in (again := capfd.readouterr().err)
    assert len([line for line in again.splitlines() if line.startswith("ssacl: ")]) == 1
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert main(["submit", "logs", "no-secret", "--address", place.cluster.dashboard]) == 1
    assert "refuses the token" in capfd.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", place.cluster.token)
    assert main(["submit", "logs", "unknown", "--address", place.cluster.dashboard]) == 1
    assert "has no job unknown" in capfd.readouterr().err


def test_a_job_without_room_is_stopped_and_a_running_one_ends_when_told(
    place: Place, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    waits = tmp_path / "waits.jsonl"
    subprocess.run(["mkfifo", str(waits)], check=True)
    evaluation = ("reports", "--pairs", str(waits), "--out", str(tmp_path / "out"))
    assert submit(place, "evaluate", "--cpus", "64", "--start-limit-s", "1", command=evaluation) == 1
    assert "found no room on the cluster within 1 s" in capfd.readouterr().err
    assert submit(place, "evaluate", "--name", "endless", "--detach", command=evaluation) == 0
    status = ["submit", "status", "endless", "--address", place.cluster.dashboard]
    end = time.monotonic() + 60
    while time.monotonic() < end and main(status) == 0 and "RUNNING" not in capfd.readouterr().out:
        time.sleep(0.2)
    assert main(["submit", "stop", "endless", "--address", place.cluster.dashboard]) == 0
    assert "stopping" in capfd.readouterr().out
    assert main(["submit", "logs", "endless", "--follow", "--address", place.cluster.dashboard]) == 130


def test_versions_that_differ_are_told_in_a_line(place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", "2.59.0")
    assert submit(place, "evaluate", command=("reports", "--pairs", "x", "--out", "y")) == 1
    assert "this is Ray 2.59.0" in capfd.readouterr().err
    # Ray keeps the first token that a process used.
    joins = (
        "import ray, sys; ray.__version__ = '2.59.0'; from ray_jobs import session; session.ray_session(address=sys.argv[1]).__enter__()"
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    told = subprocess.run([sys.executable, "-c", joins, place.cluster.gcs], env=environment, capture_output=True, text=True, timeout=120)
    assert re.search(r"ClusterError: .*Version mismatch: .*Ray: 2\.60\.0.*Ray: 2\.59\.0", told.stderr), told.stderr


def test_a_gpu_that_pytorch_cannot_use_ends_the_run_in_a_line(place: Place, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tree = tiny_tree(write_training_set(tmp_path / "set"), tmp_path / "runs")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    assert submit(place, "train", command=("--config", str(tmp_path / "tiny.yaml"), "run.use_gpu=true")) == 1
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("ssacl: ")]
    assert len(lines) == 1
    assert "A GPU was asked for, and PyTorch" in lines[0]
    assert "run.use_gpu=false" in lines[0]


OF_GPUS = {"ray_node_gram_used", "ray_node_gram_available", "ray_node_gpus_utilization"}
"""Exported by machines that have GPUs only."""


def exported(url: str, **headers: str) -> set[str]:
    return set(re.findall(r"^(\w+)[{ ]", requests.get(url, headers=headers, timeout=10).text, re.MULTILINE))


@pytest.mark.timeout(600)
def test_a_live_run_and_a_live_endpoint_export_all_that_is_watched(place: Place, tmp_path: Path) -> None:
    """What cluster/monitoring reads, against the metrics of a run and of an endpoint that both really work."""
    tree = tiny_tree(write_training_set(tmp_path / "set"), tmp_path / "runs")
    tree["run"]["stages"] = [{"kind": "contrastive", "num_steps": 400}, *tree["run"]["stages"][1:]]
    tree["run"]["checkpoint_every_steps"] = 20
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    options = ["--name", "watched", "--detach"]
    assert submit(place, "train", *options, command=("--config", str(tmp_path / "tiny.yaml"))) == 0
    seen: set[str] = set()
    while place.cluster.ask("/api/jobs/watched").json()["status"] in ("PENDING", "RUNNING"):
        seen |= exported(place.head.metrics_url)
        time.sleep(0.5)
    assert place.cluster.ask("/api/jobs/watched").json()["status"] == "SUCCEEDED"
    config = yaml.safe_load(serve_file(tmp_path, place.head.proxy_port).read_text())
    config["applications"][0]["args"] |= {"checkpoint_url": str(tmp_path / "runs" / "tiny" / "model"), "num_ingress_replicas": 1}
    key = add_key(tmp_path / "keys.json", "test", ["reports:write", "metrics:read"])
    headers = {"Authorization": f"Bearer {place.cluster.token}"}
    requests.put(f"{place.cluster.dashboard}/api/serve/applications/", json=config, headers=headers, timeout=30).raise_for_status()
    wait_for("the endpoint", lambda: replicas(place.cluster) == 2 and answers(place.head))
    url = f"http://127.0.0.1:{place.head.proxy_port}"
    film = next(place.studies.rglob("*.dcm")).read_bytes()
    allowed = {"authorization": f"Bearer {key}"}
    assert requests.post(f"{url}/v1/reports", film, headers={"content-type": "application/dicom", **allowed}, timeout=60).ok
    # A request that fails is counted among the errors.
    assert requests.post(f"{url}/v1/reports", film, timeout=60).status_code == 401
    seen |= exported(f"{url}/metrics", **allowed)
    # The gateway's are compared with its own registry in test_cluster_files.py.
    wanted = {name for names in watched().values() for name in names if not name.startswith("ssacl_gateway_")} - OF_GPUS
    end = time.monotonic() + 30
    while time.monotonic() < end and not wanted <= seen:
        seen |= exported(place.head.metrics_url)
        time.sleep(0.5)
    assert len(wanted) > 15
    assert wanted - seen == set()
