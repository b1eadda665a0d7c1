"""Storage: a folder and a real S3 server keep the same contract, and fail by name, in bounded time, with nothing half-written."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssacl.data.s3_storage import NUM_TRIES
from ssacl.data.storage import EmbeddedS3, MissingObjectError, ObjectInfo, Storage, embedded_s3, open_storage
from ssacl.errors import StorageError


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with embedded_s3(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def s3(server: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> EmbeddedS3:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "root")
    request.getfixturevalue("s3")
    return open_storage(f"s3://ssacl/{tmp_path.name}")


def test_what_is_written_is_read_listed_and_deleted(storage: Storage, tmp_path: Path) -> None:
    storage.write("a/one.bin", b"0123456789")
    storage.write("a/two.bin", b"")
    (tmp_path / "file").write_bytes(b"from a file")
    storage.upload("b/three.bin", tmp_path / "file")
    assert storage.read("a/one.bin") == b"0123456789"
    assert storage.read("a/one.bin", 3, 6) == b"345"
    assert storage.read("a/one.bin", 7) == b"789"
    assert storage.read("a/one.bin", 4, 4) == b""
    assert storage.read("a/two.bin") == b""
    assert storage.list() == [ObjectInfo("a/one.bin", 10), ObjectInfo("a/two.bin", 0), ObjectInfo("b/three.bin", 11)]
    assert [item.key for item in storage.list("a/o")] == ["a/one.bin"]
    assert storage.list("c") == []
    assert storage.sub("b").list() == [ObjectInfo("three.bin", 11)]
    assert storage.exists("a/one.bin")
    storage.write("a/one.bin", b"new")
    assert pickle.loads(pickle.dumps(storage)).read("a/one.bin") == b"new"
    storage.delete("a/one.bin")
    storage.delete("a/one.bin")
    assert not storage.exists("a/one.bin")


def test_a_missing_object_and_a_short_one_are_named(storage: Storage) -> None:
    with pytest.raises(MissingObjectError, match="no such"):
        storage.read("nothing")
    storage.write("short", b"12345")
    with pytest.raises(StorageError, match="truncated"):
        storage.read("short", 2, 9)
    with pytest.raises(StorageError):
        storage.read("short", 7, 9)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/"])
def test_keys_stay_below_the_root(storage: Storage, key: str) -> None:
    with pytest.raises(StorageError, match="no object key"):
        storage.write(key, b"x")


@pytest.mark.parametrize(("url", "said"), [("", "empty"), ("gopher://x/y", "gopher"), ("s3:///prefix", "no bucket")])
def test_urls_that_name_no_storage(url: str, said: str) -> None:
    with pytest.raises(StorageError, match=said):
        open_storage(url)


def test_a_large_file_goes_up_in_parts(s3: EmbeddedS3, tmp_path: Path) -> None:
    content = os.urandom(1 << 20) * 70
    (tmp_path / "large").write_bytes(content)
    storage = open_storage("s3://ssacl/large")
    storage.upload("large.bin", tmp_path / "large")
    assert storage.read("large.bin") == content
    assert storage.retries.total() == 0


def test_wrong_secret_wrong_key_and_missing_bucket(s3: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="bucket s3://elsewhere does not exist"):
        open_storage("s3://elsewhere/x").exists("y")
    storage = open_storage("s3://ssacl/x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "w" * 40)
    for call in (lambda: storage.write("y", b""), lambda: storage.read("y"), storage.list, lambda: storage.exists("y")):
        with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY") as caught:
            call()
        assert not isinstance(caught.value, MissingObjectError)
        assert "w" * 40 not in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StorageError, match="refused the credentials"):
        storage.write("y", b"")


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="no credentials"):
        open_storage("s3://bucket/x").read("y")


def test_a_server_that_goes_away_is_named_in_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with embedded_s3(tmp_path / "s3") as short_lived:
        for name, value in short_lived.environment.items():
            monkeypatch.setenv(name, value)
        storage = open_storage("s3://ssacl/x")
        storage.write("before", b"1")
        os.kill(short_lived.pid, signal.SIGKILL)
        pauses: list[float] = []
        monkeypatch.setattr("ssacl.data.s3_storage.time.sleep", pauses.append)
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"does not answer.*Start the server") as caught:
            storage.write("after", b"2" * 100_000)
        assert time.monotonic() - started + sum(pauses) < 30
        assert len(pauses) == storage.retries.total() == NUM_TRIES - 1
        assert short_lived.secret_key not in str(caught.value)
    assert (tmp_path / "s3" / "ssacl" / "x" / "before").read_bytes() == b"1"
    assert not (tmp_path / "s3" / "ssacl" / "x" / "after").exists()


@pytest.mark.parametrize(("num_short", "arrives"), [(2, True), (99, False)])
def test_a_body_that_breaks_off_is_read_again(num_short: int, arrives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssacl.data.s3_storage.time.sleep", lambda _: None)
    body = b"x" * 1000
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        num_requests = 0

        def serve() -> None:
            nonlocal num_requests
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    num_requests += 1
                    sent = body[:100] if num_requests <= num_short else body
                    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1000\r\n\r\n" + sent)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s" * 20)
        storage = open_storage("s3://bucket/x")
        if arrives:
            assert storage.read("y") == body
            assert num_requests == num_short + 1
            assert storage.retries.total() == num_short
        else:
            with pytest.raises(StorageError, match="breaks off"):
                storage.read("y")
            assert num_requests == NUM_TRIES


def test_a_full_disk_leaves_the_old_object(tmp_path: Path) -> None:
    # A real refusal of the kernel: no file of this process may grow beyond 4 kB.
    program = f"""
import resource
from ssacl.data.storage import open_storage
from ssacl.errors import StorageError
storage = open_storage({str(tmp_path / "root")!r})
storage.write("kept", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for key in ("kept", "new"):
    try:
        storage.write(key, b"n" * 100000)
    except StorageError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("the disk or quota is full. Free space") == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "root").iterdir()} == {"kept": b"old"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Check the path"):
        open_storage(tmp_path / "file" / "below").write("x", b"1")


def test_a_port_that_is_taken(server: EmbeddedS3, tmp_path: Path) -> None:
    port = int(server.endpoint_url.rsplit(":", 1)[1])
    with pytest.raises(StorageError, match=rf"Port {port} .* is taken"), embedded_s3(tmp_path, port=port):
        pass


def test_the_server_keeps_its_keys_off_the_command_line(server: EmbeddedS3) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    assert server.secret_key.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
    assert server.secret_key not in repr(server)


def _is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_the_server_ends_with_its_block_and_with_its_parent(tmp_path: Path) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc")
    with pytest.raises(KeyboardInterrupt), embedded_s3(tmp_path / "a") as running:
        raise KeyboardInterrupt
    assert not _is_running(running.pid)
    program = f"""
import sys, time
from ssacl.data.storage import embedded_s3
with embedded_s3({str(tmp_path / "b")!r}) as running:
    print(running.pid, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert _is_running(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(pid)
