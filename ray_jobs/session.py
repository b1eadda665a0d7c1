"""Start Ray here, or join a cluster; stop only what was started."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ray_jobs import node_secrets
from ssacl.errors import ClusterError

STORAGE_VARIABLES = ("AWS_", "DICOMWEB_", "SSACL_")
_KEPT_HERE = ("SSACL_KEY_SECRET",)
"""What no worker needs: settings that need it carry it, and Ray writes the variables of its workers to its own log."""

_KNOCK_S = 5.0
_LONGEST_SAYING = 300
"""Characters of what Ray said."""


def storage_environment() -> dict[str, str]:
    """The variables that a Ray worker needs to reach object storage as this process does.

    A submitted job's secrets are not among them: each machine of the cluster has its own (`ray_jobs.node_secrets`).
    """
    kept = {*_KEPT_HERE, *node_secrets.references(os.environ.get(node_secrets.REFERENCES, ""))}
    return {name: value for name, value in os.environ.items() if name.startswith(STORAGE_VARIABLES) and name not in kept}


@contextmanager
def ray_session(num_cpus: int | None = None, address: str | None = None) -> Iterator[str]:
    """A Ray runtime inside the block: the one already running, the cluster at `address`, or a quiet local one.

    Gives the URL of the dashboard of a cluster that was joined; "" where there is none.

    Parameters
    ----------
    num_cpus : CPUs of a local one; none: as many as the machine has. Ignored when a cluster is joined.
    address : "auto", "HOST:PORT" or "ray://..."; none: RAY_ADDRESS (set inside a Ray job), else a local one.

    Raises
    ------
    ClusterError
        No cluster answers at `address`, or one of another version.
    """
    import ray

    if ray.is_initialized():
        yield ""
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    handlers = _handlers()
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Configurations name data by paths from here.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    try:
        if address:
            _knock(address)
            context = ray.init(address=address, **quiet)
        else:
            # Named local, or a cluster that somebody started on this machine would be joined.
            context = ray.init(address="local", num_cpus=num_cpus or os.cpu_count(), include_dashboard=False, **quiet)
    # Ray raises a bare Exception when it does not come up in time.
    except Exception as error:
        where = f"the Ray cluster at {address}" if address else "a local Ray"
        said = " ".join(str(error).split())[:_LONGEST_SAYING] or type(error).__name__
        raise ClusterError(
            f"Cannot reach or start {where}: {said.rstrip('.')}. Check --address, or leave it out to run locally."
        ) from error
    # Ray's own handler of SIGTERM prints a stack and aborts, which would leave what this process has started running.
    _install({**handlers, signal.SIGTERM: handlers.get(signal.SIGTERM) or _terminate})
    try:
        url = getattr(context, "dashboard_url", None)
        yield f"http://{url}" if url else ""
    finally:
        ray.shutdown()
        _install(handlers)


def _knock(address: str) -> None:
    """Raise `OSError` where nobody listens: Ray would ask for minutes, and say so on stderr only."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S):
            pass


def _handlers() -> dict[signal.Signals, Any]:
    """What SIGINT and SIGTERM do now; nothing in a thread, which must not change it."""
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    return found if threading.current_thread() is threading.main_thread() else {}


def _install(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    # Not an error of any part: every `finally` on the way out runs, then the exit code says which signal it was.
    raise SystemExit(128 + number)
