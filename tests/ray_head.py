"""A real Ray head with its dashboard, on ports and in a folder of its own, for tests. It ends by its own processes, never by `ray stop`."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import requests

from benchmarks.raylets import free_ports

_START_LIMIT_S = 120.0


@dataclass(frozen=True)
class RayHead:
    dashboard: str
    gcs: str
    folder: Path
    """Sessions, with every log."""
    token: str


@contextlib.contextmanager
def ray_head(environment: Mapping[str, str], num_cpus: int = 2) -> Iterator[RayHead]:
    """A head whose machines have `environment`; gone at the end of the block."""
    # Ray's sockets lie in it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ssacl-head-", dir="/tmp"))
    names = ["port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"]
    names += ["ray-client-server-port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--include-dashboard=true",
        "--node-ip-address=127.0.0.1",
    ]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={num_cpus}", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += [f"--object-store-memory={150 << 20}"]
    token = secrets.token_hex(20)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    log = (folder / "start.log").open("wb")
    variables = {**os.environ, "PATH": path, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    process = subprocess.Popen(command, env={**variables, **environment}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        head = RayHead(f"http://127.0.0.1:{ports['dashboard-port']}", f"127.0.0.1:{ports['port']}", folder, token)
        _wait(head, process)
        yield head
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(8)
        # What the launcher may have left of its own session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def ask(head: RayHead, path: str) -> requests.Response:
    return requests.get(f"{head.dashboard}{path}", headers={"Authorization": f"Bearer {head.token}"}, timeout=10)


def _wait(head: RayHead, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if all(ask(head, path).ok for path in ("/api/version", "/api/jobs/")):
                return
        time.sleep(0.2)
    raise AssertionError((head.folder / "start.log").read_text(errors="replace")[-2000:])
