"""One writer at a time (an ingest into a data set, a training run under its name): a small object in storage, held by a heartbeat.

Storage has no locks and often no conditional writes, so a claim is written, left to settle and read back; the last writer holds it. A lease
whose heartbeat stands still is taken over: at once where its process ran on this machine and is gone, else after `PATIENCE_S`.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ssacl.data.storage import FolderStorage, MissingObjectError, Storage
from ssacl.errors import StorageError

LEASE = "_ingest.lock"
HEARTBEAT_S = 10.0
PATIENCE_S = 35.0
"""Three heartbeats and some: longer than one that is late."""
SETTLE_S, FOLDER_SETTLE_S = 1.0, 0.05
"""Longer than two claims can overlap, on object storage and in a folder."""

logger = logging.getLogger(__name__)
_held: set[str] = set()
"""Runs of this process that hold a lease."""


@dataclass(frozen=True)
class Holder:
    """Who writes where only one may, and what a second one is told."""

    name: str
    advice: str
    key: str = LEASE


INGEST = Holder("ingest", "Let it end, or stop it, then run again: finished shards are not made again.")


class BusyError(StorageError):
    """Another one writes there."""


class Lease:
    """A held lease; `check` before anything is made visible."""

    def __init__(self, storage: Storage, holder: Holder) -> None:
        self._storage, self._holder, self._run = storage, holder, secrets.token_hex(8)
        self._beats, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ssacl-lease", daemon=True)

    def check(self) -> None:
        """
        Raises
        ------
        BusyError
            Another run has taken the lease.
        """
        content = _read(self._storage, self._holder.key)
        if content is None or json.loads(content)["run"] != self._run:
            raise _busy(self._storage, self._holder)

    def _claim(self) -> None:
        _wait_for(self._storage, self._holder)
        _held.add(self._run)
        self._write()
        time.sleep(FOLDER_SETTLE_S if isinstance(self._storage, FolderStorage) else SETTLE_S)
        self.check()
        self._thread.start()

    def _release(self) -> None:
        _held.discard(self._run)
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        # A store that is gone keeps the lease; its heartbeat stands still.
        with suppress(StorageError):
            self.check()
            self._storage.delete(self._holder.key)
            self._storage.sweep(lambda key: key == self._holder.key)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                self.check()
                self._write()
            except StorageError as error:
                logger.warning("heartbeat: %s", error)

    def _write(self) -> None:
        self._beats += 1
        content = json.dumps({"run": self._run, "beats": self._beats, "process": _this_process()})
        self._storage.write(self._holder.key, content.encode())


@contextmanager
def hold_lease(storage: Storage, holder: Holder = INGEST) -> Iterator[Lease]:
    """The right to write there, until the block ends.

    Raises
    ------
    BusyError
        Another one holds it.
    StorageError
        Storage cannot be reached.
    """
    lease = Lease(storage, holder)
    try:
        lease._claim()
        yield lease
    finally:
        lease._release()


def is_free(storage: Storage, holder: Holder) -> bool:
    """Whether nobody holds the lease there, or its process ran on this machine and is gone; without waiting for a heartbeat."""
    seen = _read(storage, holder.key)
    return seen is None or _is_gone(seen)


def _busy(storage: Storage, holder: Holder) -> BusyError:
    return BusyError(f"Another {holder.name} is writing into {storage.url}. {holder.advice}")


def _wait_for(storage: Storage, holder: Holder) -> None:
    """Return once nobody holds the lease."""
    if is_free(storage, holder):
        return
    seen = _read(storage, holder.key)
    logger.warning("another %s was writing into %s; looking for %.0f s whether it still does", holder.name, storage.url, PATIENCE_S)
    give_up_at = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_at:
        time.sleep(min(1.0, PATIENCE_S / 10))
        now = _read(storage, holder.key)
        if now is None or _is_gone(now):
            return
        if now != seen:
            raise _busy(storage, holder)


def _read(storage: Storage, key: str) -> bytes | None:
    """The lease as it stands; none if there is none or it is not whole."""
    try:
        content = storage.read(key)
        lease = json.loads(content)
        return content if isinstance(lease["run"], str) and isinstance(lease["process"], str) else None
    except (MissingObjectError, ValueError, KeyError, TypeError):
        return None


def _is_gone(content: bytes) -> bool:
    """Whether the holder ran on this machine, where this process would see it, and runs no more."""
    lease = json.loads(content)
    holder, here = lease["process"], _this_process()
    if holder == here:
        return lease["run"] not in _held
    place, _, process = holder.rpartition(" ")
    number, _, started = process.partition("@")
    return bool(here) and place == here.rpartition(" ")[0] and _started(number) != started


def _this_process() -> str:
    """Start of the machine, process namespace, process id @ its start; "" where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')} {os.getpid()}@{_started(str(os.getpid()))}"
    except OSError:
        return ""


def _started(pid: str) -> str:
    """Start of a running process in ticks since the machine's; "" if there is none (a zombie writes no more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
