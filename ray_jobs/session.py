"""Start Ray here, or join a cluster; stop only what was started."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ssacl.errors import SSACLError

STORAGE_VARIABLES = ("AWS_", "SSACL_")


def storage_environment() -> dict[str, str]:
    """The variables that a Ray worker needs to reach object storage as this process does."""
    return {name: value for name, value in os.environ.items() if name.startswith(STORAGE_VARIABLES)}


@contextmanager
def ray_session(num_cpus: int | None = None, address: str | None = None) -> Iterator[None]:
    """A Ray runtime inside the block: the one already running, the cluster at `address`, or a quiet local one.

    Parameters
    ----------
    num_cpus : CPUs of a local one; none: as many as the machine has. Ignored when a cluster is joined.
    address : "auto", "HOST:PORT" or "ray://..."; none: RAY_ADDRESS (set inside a Ray job), else a local one.

    Raises
    ------
    SSACLError
        No cluster answers at `address`.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(num_cpus=num_cpus or os.cpu_count(), include_dashboard=False, **quiet)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        raise SSACLError(
            f"Cannot reach or start {where}: {str(error).splitlines()[0]} Check --address, or leave it out to run locally."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
