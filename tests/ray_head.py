"""A real Ray head with its dashboard, on ports and in a folder of its own, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from benchmarks.raylets import LocalCluster, Node


@contextlib.contextmanager
def ray_head(environment: Mapping[str, str], *options: str, num_cpus: int = 2) -> Iterator[tuple[LocalCluster, Node]]:
    """A cluster of one head that has `environment`, started with further options; gone at the end of the block."""
    with LocalCluster(environment) as cluster:
        yield cluster, cluster.start_head(num_cpus, options)
