"""A Ray cluster of this machine's own: each node is a raylet with processes, address, ports and a folder of its own, and can be lost alone.

Nodes end by their own processes, never by `ray stop`: other clusters of the machine are not touched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import requests

from ssacl.errors import ClusterError

_HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port")
_PORTS = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port", "runtime-env-agent-port")
_HEAD_IP = "127.0.0.2"
"""For 127.0.0.1 Ray would put the machine's outer address, where this head does not listen."""
_NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
_PORT_FILES = {"dashboard-agent-grpc-port": "metrics_agent_port"}
_START_LIMIT_S = 150.0
_MOST_STARTS = 2
_OBJECT_STORE_BYTES = 150 << 20
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True)
class Node:
    """A started node."""

    node_id: str
    ip: str
    ports: Mapping[str, int]
    proxy_port: int
    """Of its Serve proxy; nodes of one machine cannot all have the same. The head's is the one to deploy with."""
    folder: Path
    """Its session, with every log."""
    process: subprocess.Popen[bytes]

    def tell_ports(self) -> None:
        """Write the files in which the node's agents tell their ports, which are known: Ray's raylet aborts where they come after 15 s, as
        they do on a busy machine."""
        for session in self.folder.glob("session_2*"):
            for name in _PORTS:
                path = session / f"{_PORT_FILES.get(name, name.replace('-', '_'))}_{self.node_id}"
                if not path.exists():
                    path.write_text(str(self.ports[name]), encoding="utf-8")

    @property
    def metrics_url(self) -> str:
        return f"http://{self.ip}:{self.ports['metrics-export-port']}/metrics"

    def lose(self) -> None:
        """End all of its processes at once, as when the power fails."""
        for process in reversed(self.processes()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)

    def stop(self) -> None:
        """End it in order, or at once where that takes too long."""
        processes = self.processes()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(processes, timeout=8)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)

    def processes(self) -> list[psutil.Process]:
        """The launcher and everything below it."""
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


class LocalCluster:
    """Nodes with 127.0.0.2, 127.0.0.3, ... as addresses; use as a context manager, `start_head` first.

    Parameters
    ----------
    environment : variables of every node, on top of this process'.
    with_redis : keep the head's state in a Redis of its own, so that a head that was lost can be started again.

    Raises
    ------
    ClusterError
        redis-server is missing, or a node does not start; the end of its log is told.
    """

    def __init__(self, environment: Mapping[str, str], with_redis: bool = False) -> None:
        # Ray's sockets lie in it, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ssacl-ray-", dir="/tmp"))
        self.token = secrets.token_hex(20)
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        ray = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        self._environment = {**os.environ, "PATH": path, **ray, **environment}
        self._nodes: list[Node] = []
        self._num_started = 0
        *ports, self._head_proxy_port = free_ports(len(_HEAD_PORTS) + len(_PORTS) + 1)
        self._head_ports = dict(zip((*_HEAD_PORTS, *_PORTS), ports, strict=True))
        self._redis_options: list[str] = []
        self._redis: subprocess.Popen[bytes] | None = None
        if with_redis:
            self._start_redis()

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self._head_ports['dashboard-port']}"

    @property
    def gcs(self) -> str:
        return f"{_HEAD_IP}:{self._head_ports['port']}"

    def start_head(self, num_cpus: int = 0, options: Sequence[str] = ()) -> Node:
        """The head, or the head again: on the same ports, with what Redis kept of it."""
        command = ["--head", "--include-dashboard=true", "--dashboard-host=127.0.0.1", *self._redis_options, *options]

        def is_ready() -> bool:
            return all(self.ask(path).ok for path in ("/api/version", "/api/jobs/")) and _HEAD_IP in self.alive()

        return self._started(lambda: self._start(_HEAD_IP, self._head_ports, self._head_proxy_port, num_cpus, command), is_ready)

    def add_node(self, num_cpus: int) -> Node:
        """A node beside the head, once the head counts it among its own."""
        *ports, proxy_port = free_ports(len(_PORTS) + 1)
        ip = f"127.0.0.{self._num_started + 2}"
        named = dict(zip(_PORTS, ports, strict=True))
        return self._started(
            lambda: self._start(ip, named, proxy_port, num_cpus, [f"--address={self.gcs}"]),
            lambda: ip in self.alive(),
        )

    def alive(self) -> list[str]:
        """Addresses of the nodes that the head takes to be alive."""
        nodes = self.ask("/nodes?view=summary").json()["data"]["summary"]
        return [node["raylet"]["nodeManagerAddress"] for node in nodes if node["raylet"]["state"] == "ALIVE"]

    def ask(self, path: str) -> requests.Response:
        """The dashboard's answer."""
        return requests.get(f"{self.dashboard}{path}", headers={"Authorization": f"Bearer {self.token}"}, timeout=10)

    def close(self) -> None:
        """End every node, and remove what they wrote."""
        for node in reversed(self._nodes):
            node.stop()
        if self._redis is not None:
            self._redis.kill()
            self._redis.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, ip: str, ports: Mapping[str, int], proxy_port: int, num_cpus: int, options: Sequence[str]) -> Node:
        self._num_started += 1
        folder = self.folder / f"n{self._num_started}"
        folder.mkdir()
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", f"--node-ip-address={ip}", f"--temp-dir={folder}"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        command += [f"--num-cpus={num_cpus}", "--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={_OBJECT_STORE_BYTES}"]
        with (folder / "start.log").open("wb") as log:
            own = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(proxy_port), _NODE_ID: secrets.token_hex(28)}
            variables = {**own, **self._environment}
            process = subprocess.Popen(
                [*command, *options], env=variables, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, process_group=0
            )
        node = Node(variables[_NODE_ID], ip, ports, proxy_port, folder, process)
        self._nodes.append(node)
        return node

    def _started(self, start: Callable[[], Node], is_ready: Callable[[], bool]) -> Node:
        """A node that is ready; one that does not come up is started once more."""
        told = ""
        for _ in range(_MOST_STARTS):
            node, end = start(), time.monotonic() + _START_LIMIT_S
            while time.monotonic() < end and node.process.poll() is None:
                with contextlib.suppress(requests.RequestException, ValueError, KeyError, TypeError):
                    node.tell_ports()
                    if is_ready():
                        return node
                time.sleep(0.5)
            node.stop()
            told = (node.folder / "start.log").read_text(errors="replace").strip()[-1000:]
        raise ClusterError(f"A Ray node did not start, tried {_MOST_STARTS} times. Its log ends: {told}")

    def _start_redis(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise ClusterError("redis-server is not installed: make setup-servers.")
        [port], password = free_ports(1), secrets.token_hex(16)
        self._redis = subprocess.Popen([program, "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)
        settings = f'bind 127.0.0.1\nport {port}\nrequirepass {password}\nsave ""\nappendonly no\ndir {self.folder}\n'
        assert self._redis.stdin is not None
        self._redis.stdin.write(settings.encode())
        self._redis.stdin.close()
        self._redis_options = [f"--redis-password={password}"]
        # As KubeRay sets them for a head with Redis.
        self._environment |= {
            "RAY_REDIS_ADDRESS": f"127.0.0.1:{port}",
            "RAY_external_storage_namespace": self.folder.name,
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
        }
