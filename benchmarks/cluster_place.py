"""Where the cluster benchmarks work: a head with Redis and two more nodes, all raylets of this machine, an S3 server, and the runbook."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import requests

from benchmarks.raylets import LocalCluster, Node
from benchmarks.record import REPOSITORY
from benchmarks.runbook import Runbook, Running
from ssacl.data.storage import EmbeddedS3, embedded_s3
from ssacl.errors import ClusterError

_WAIT_S = 240.0


@dataclass
class Place:
    folder: Path
    s3: EmbeddedS3
    cluster: LocalCluster
    book: Runbook
    head: Node
    workers: list[Node]
    """Each with room for one train worker."""
    phases_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note how long the block takes."""
        started = time.monotonic()
        yield
        self.phases_s[name] = round(time.monotonic() - started, 1)
        print(f"cluster: {name} took {self.phases_s[name]} s", file=sys.stderr)


@contextmanager
def started_place(folder: Path) -> Iterator[Place]:
    """Everything in an empty folder; gone at the end of the block."""
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    with embedded_s3(folder / "s3") as s3:
        # Of the machines of the cluster, as the Secrets of the page give them.
        machines = {**s3.environment, "SSACL_KEY_SECRET": secrets.token_hex(16), "SSACL_MODEL_PUBLIC_KEY": str(folder / "signing.pub")}
        with LocalCluster(machines, with_redis=True) as cluster:
            mine = {**s3.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
            started = time.monotonic()
            place = Place(
                folder=folder,
                s3=s3,
                cluster=cluster,
                book=Runbook({"s3://bucket": "s3://ssacl", "http://127.0.0.1:8265": cluster.dashboard}, mine, folder),
                head=cluster.start_head(),
                workers=[cluster.add_node(num_cpus=1) for _ in range(2)],
            )
            place.phases_s["start"] = round(time.monotonic() - started, 1)
            yield place


def wait_for(what: str, happens: Callable[[], bool], running: Running | None = None) -> None:
    """
    Raises
    ------
    ClusterError
        It does not come, or the command behind it ends before.
    """
    end = time.monotonic() + _WAIT_S
    while True:
        try:
            if happens():
                return
        except (requests.RequestException, ValueError, KeyError, TypeError):
            # A head that starts, or is away.
            pass
        if running is not None and running.process.poll() is not None:
            raise ClusterError(f"The command ended before {what}: {running.tail()}")
        if time.monotonic() > end:
            raise ClusterError(f"Waited {_WAIT_S:.0f} s for {what}.{f' {running.tail()}' if running else ''}")
        time.sleep(0.3)
