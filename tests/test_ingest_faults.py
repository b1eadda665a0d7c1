"""However ingest is stopped, what it leaves is whole or invisible, and the same command goes on to the very same data set."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_s3 import KINDS, faulty_s3
from ingest_sets import SECRET, SOURCE, hashes, ingest_films, write_films

import ssacl.data.ingest as ingest_module
from ssacl.data.chunks import Chunk, Made, run_chunk
from ssacl.data.ingest import IngestSettings
from ssacl.data.lease import LEASE, BusyError, hold_lease
from ssacl.data.shards import INDEX, ShardIndex, read_sample
from ssacl.data.storage import FolderStorage, embedded_s3, open_storage
from ssacl.data.verification import verify
from ssacl.errors import DataError, StorageError

NUM_STUDIES = 40


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_films(tmp_path_factory.mktemp("films"), NUM_STUDIES)


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every file of the undisturbed data set."""
    out = tmp_path_factory.mktemp("whole") / "set"
    summary = ingest_films(table, out)
    assert summary.rejects == {"duplicate": 5, "missing_file": 1, "unreadable": 1}
    assert sum(summary.num_samples.values()) == NUM_STUDIES - 7
    assert verify(open_storage(out)) == []
    assert LEASE not in hashes(out)
    return hashes(out)


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own, and give its id; the process ends with 0, or 1 after an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def was_killed(child: int) -> bool:
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_ten_random_moments(table: Path, whole: dict[str, str], tmp_path: Path) -> None:
    started = time.monotonic()
    assert not was_killed(in_child(lambda: ingest_films(table, tmp_path / "timed")))
    duration, moments = time.monotonic() - started, random.Random(4)
    num_killed, left = 0, set()
    for attempt in range(40):
        out = tmp_path / f"{attempt}"
        child = in_child(lambda out=out: ingest_films(table, out))  # type: ignore[misc]
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if was_killed(child):
            num_killed += 1
            left.add(len(hashes(out)))
            ingest_films(table, out)
        assert hashes(out) == whole
        if num_killed == 10:
            break
    assert num_killed == 10
    assert len(left) > 1, "some early, some late: on a fast machine most are before the first shard"


def test_killed_before_every_write(table: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Again and again in the same place, one write further each time."""
    write, out = FolderStorage.write, tmp_path / "set"

    def write_until(last: int) -> Callable[..., None]:
        done = 0

        def write_or_die(self: FolderStorage, key: str, content: bytes) -> None:
            nonlocal done
            done += 1
            if done > last:
                with self._replacing(key) as descriptor:
                    os.write(descriptor, content[:100])
                    os.kill(os.getpid(), signal.SIGKILL)
            write(self, key, content)

        return write_or_die

    def ingest_until(last: int) -> None:
        FolderStorage.write = write_until(last)  # type: ignore[method-assign]
        ingest_films(table, out)

    for last in range(200):
        if not was_killed(in_child(lambda last=last: ingest_until(last))):  # type: ignore[misc]
            break
        assert not (out / INDEX).exists()
    assert 5 < last < 30
    assert hashes(out) == whole


@pytest.mark.parametrize("seed", [1, 2])
def test_s3_that_fails_now_and_then(seed: int, table: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssacl.data.s3_storage.READ_TIMEOUT_S", 0.4)
    monkeypatch.setattr("ssacl.data.s3_storage.time.sleep", lambda _: None)
    with embedded_s3(tmp_path / "s3") as server, faulty_s3(server, seed) as faulty:
        for name, value in faulty.environment.items():
            monkeypatch.setenv(name, value)
        summary = ingest_films(table, "s3://ssacl/set")
        assert set(faulty.injected) == set(KINDS)
        assert sum(summary.retries.values()) > 0
        assert "tried again: " in summary.describe()
        # One epoch of reading: a flipped byte within a range shows in the sample's checksum.
        storage = open_storage("s3://ssacl/set")
        index = ShardIndex.load(storage)
        samples = {entry.key: read_sample(storage, entry) for shard in index.shards for entry in shard.samples}
        assert {"wrong_bytes", "short_body", "timeout", "server_error"} <= set(storage.retries)
        assert verify(storage) == []
    assert hashes(tmp_path / "s3" / "ssacl" / "set") == whole
    folder = open_storage(tmp_path / "s3" / "ssacl" / "set")
    assert samples == {entry.key: read_sample(folder, entry) for shard in index.shards for entry in shard.samples}


def test_s3_that_is_gone_stops_the_run_and_the_next_goes_on(
    table: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("ssacl.data.s3_storage.time.sleep", pauses.append)
    done = 0

    def then_down(chunk: Chunk, url: str, settings: IngestSettings) -> Made:
        nonlocal done
        faulty.down = done == 2
        done += 1
        return run_chunk(chunk, url, settings)

    with embedded_s3(tmp_path / "s3") as server, faulty_s3(server, share=0.0) as faulty:
        for name, value in faulty.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ingest_module, "run_chunk", then_down)
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"does not answer or breaks off .* run again: finished parts are kept"):
            ingest_films(table, "s3://ssacl/set")
        assert time.monotonic() - started + sum(pauses) < 120
        monkeypatch.setattr(ingest_module, "run_chunk", run_chunk)
        faulty.down = False
        with pytest.raises(DataError, match="No data set"):
            ShardIndex.load(open_storage("s3://ssacl/set"))
        summary = ingest_films(table, "s3://ssacl/set")
        assert summary.num_shards_written == len([name for name in whole if name.startswith("_parts/")]) - 2
    assert hashes(tmp_path / "s3" / "ssacl" / "set") == whole


def test_a_full_disk_leaves_no_index(table: Path, tmp_path: Path) -> None:
    program = f"""
import resource
from pathlib import Path
from ingest_sets import ingest_films
from ssacl.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    ingest_films(Path({str(table)!r}), {str(tmp_path / "set")!r})
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert "the disk or quota is full" in done.stdout
    assert list((tmp_path / "set").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_by_name_and_it_goes_on(number: int, table: Path, whole: dict[str, str], tmp_path: Path) -> None:
    columns = [f"--column={role}={name}" for role, name in SOURCE.columns.items()]
    command = [sys.executable, "-m", "ssacl.cli", "data", "ingest", str(table), "--format", "csv", "--out", str(tmp_path / "set"), *columns]
    environment = os.environ | {"SSACL_KEY_SECRET": SECRET}
    with subprocess.Popen([*command, "--num-workers", "0"], env=environment, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 60
        while not (tmp_path / "set" / LEASE).exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(number)
        assert child.stderr is not None
        said = child.stderr.read()
    if number == signal.SIGINT:
        assert child.returncode == 130
        assert "Interrupted. The same command goes on where it stopped." in said
    assert child.returncode != 0
    assert "Traceback" not in said
    if number == signal.SIGINT:
        assert not (tmp_path / "set" / LEASE).exists()
    subprocess.run([*command, "--num-workers", "0"], env=environment, check=True, capture_output=True)
    index = ShardIndex.load(open_storage(tmp_path / "set"))
    assert sum(shard.count for shard in index.shards) == NUM_STUDIES - 7


def test_two_ingests_at_once(table: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssacl.data.lease.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("ssacl.data.lease.PATIENCE_S", 20.0)
    under_way, go_on = threading.Event(), threading.Event()

    def waiting(chunk: Chunk, url: str, settings: IngestSettings) -> Made:
        under_way.set()
        assert go_on.wait(30)
        return run_chunk(chunk, url, settings)

    monkeypatch.setattr(ingest_module, "run_chunk", waiting)
    first = threading.Thread(target=ingest_films, args=(table, tmp_path / "set"))
    first.start()
    assert under_way.wait(30)
    with pytest.raises(BusyError, match="Another ingest is writing into"):
        ingest_films(table, tmp_path / "set")
    go_on.set()
    first.join()
    assert hashes(tmp_path / "set") == whole


def test_a_run_that_lost_its_lease_commits_nothing(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def robbed(chunk: Chunk, url: str, settings: IngestSettings) -> Made:
        (tmp_path / "set" / LEASE).write_text(json.dumps({"run": "another", "process": "elsewhere 1@1"}))
        return run_chunk(chunk, url, settings)

    monkeypatch.setattr(ingest_module, "run_chunk", robbed)
    with pytest.raises(BusyError):
        ingest_films(table, tmp_path / "set")
    assert not (tmp_path / "set" / INDEX).exists()
    assert json.loads((tmp_path / "set" / LEASE).read_text())["run"] == "another"


def test_a_lease_of_elsewhere_is_taken_over_when_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ssacl.data.lease.PATIENCE_S", 0.3)
    storage = open_storage(tmp_path)
    for content in ('{"run": "other", "process": "elsewhere 1@1"}', "{cut"):
        storage.write(LEASE, content.encode())
        with caplog.at_level(logging.WARNING), hold_lease(storage) as lease:
            lease.check()
        assert not storage.exists(LEASE)
    assert caplog.text.count("looking for") == 1
