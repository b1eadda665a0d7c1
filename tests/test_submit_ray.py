"""Jobs on a real Ray head: real work with secrets that never leave it, exit codes, jobs that fit nowhere, stopping."""

from __future__ import annotations

import json
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray_head import RayHead, ask, ray_head

from ssacl.cli import main
from ssacl.data.shards import ShardIndex
from ssacl.data.storage import EmbeddedS3, embedded_s3, open_storage
from ssacl.phantom import write_dicom_tree

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.external]
NUM_STUDIES = 4


@dataclass(frozen=True)
class Place:
    head: RayHead
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
        with ray_head(node) as head:
            yield Place(head, s3, folder / "studies", key_file, planted)


@pytest.fixture(autouse=True)
def _token(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", place.head.token)


def submit(place: Place, job: str, *options: str, command: tuple[str, ...]) -> int:
    return main(["submit", job, "--address", place.head.dashboard, *options, "--", *command])


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
    listed = ask(place.head, "/api/jobs/first-ingest").json()
    assert str(place.key_file) in json.dumps(listed["runtime_env"])
    told = {path: path.read_bytes() for path in place.head.folder.rglob("*") if path.is_file() and not path.is_symlink()}
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
    assert main(["submit", "status", "--address", place.head.dashboard]) == 0
    assert "no-secret  FAILED" in (told := capfd.readouterr().out)
    assert "exit 1" in told
    assert main(["submit", "logs", "no-secret", "--address", place.head.dashboard]) == 0
    assert "NOT_GIVEN" in capfd.readouterr().out
    assert submit(place, "evaluate", *options, command=evaluation) == 1
    assert "no-secret" in (again := capfd.readouterr().err)
    assert len([line for line in again.splitlines() if line.startswith("ssacl: ")]) == 1
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert main(["submit", "logs", "no-secret", "--address", place.head.dashboard]) == 1
    assert "refuses the token" in capfd.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", place.head.token)
    assert main(["submit", "logs", "unknown", "--address", place.head.dashboard]) == 1
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
    status = ["submit", "status", "endless", "--address", place.head.dashboard]
    end = time.monotonic() + 60
    while time.monotonic() < end and main(status) == 0 and "RUNNING" not in capfd.readouterr().out:
        time.sleep(0.2)
    assert main(["submit", "stop", "endless", "--address", place.head.dashboard]) == 0
    assert "stopping" in capfd.readouterr().out
    assert main(["submit", "logs", "endless", "--follow", "--address", place.head.dashboard]) == 130
