"""The durable spool: a folder in which an accepted instance stays until it is settled, whatever is killed meanwhile.

    incoming/   being written; whatever lies here at the start belongs to nobody and is removed
    waiting/    KEY/ with film.dcm, entry.json and, once the endpoint has answered, results/
    done/       KEY.json: what became of it, without pixels or names; duplicates are known by it
    quarantine/ KEY/ as in waiting, with the reason in entry.json

KEY is a hash of the SOP Instance UID. Every step from one state to the next is one rename of a whole folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from serve.gateway.config import Limits, Retention
from serve.gateway.outcomes import SpoolFullError
from ssacl.errors import ServeError

logger = logging.getLogger(__name__)
_STATES = ("incoming", "waiting", "done", "quarantine")


@dataclass(frozen=True)
class Entry:
    """What is known of a waiting instance."""

    key: str
    caller: str
    """AE title, or name of a STOW-RS client."""
    received_at: float
    """Seconds since the epoch."""
    pending: tuple[str, ...]
    """Destinations that have not taken the results yet."""
    request_id: str
    """Names it in the logs of gateway and endpoint, without saying which instance it is."""
    attempts: int = 0
    """Failures that may be its own fault."""
    reason: str = ""
    """Why it was last put off, or why it is in quarantine."""


@dataclass
class _Held:
    """Of a waiting instance, in memory."""

    num_bytes: int
    received_at: float
    has_results: bool = False


class Spool:
    """One process at a time holds a spool.

    Raises
    ------
    ServeError
        Another gateway holds it.
    """

    def __init__(self, folder: Path, limits: Limits, retention: Retention) -> None:
        self._folder, self._limits, self._retention = folder, limits, retention
        for state in _STATES:
            (folder / state).mkdir(parents=True, exist_ok=True)
        # Held by the kernel for the process: kill -9 lets it go.
        self._lock_file = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise ServeError(f"Another gateway works on the spool {folder}. Stop it, or give this one a folder of its own.") from error
        self._guard = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._writing: set[str] = set()
        self._recover()

    def close(self) -> None:
        """Let another process take the spool."""
        self._lock_file.close()

    def waiting(self) -> list[str]:
        """Keys of the instances that wait, oldest first."""
        with self._guard:
            return sorted(self._held, key=lambda key: self._held[key].received_at)

    def oldest(self) -> float | None:
        """When the oldest instance that waits was received, in seconds since the epoch."""
        with self._guard:
            return min((held.received_at for held in self._held.values()), default=None)

    def num_bytes(self) -> int:
        """Of what waits."""
        with self._guard:
            return sum(held.num_bytes for held in self._held.values())

    def depth(self, state: str) -> int:
        """Instances that are "unread", "undelivered" (the endpoint has answered) or in "quarantine"."""
        if state == "quarantine":
            return len(os.listdir(self._folder / "quarantine"))
        with self._guard:
            return sum(held.has_results == (state == "undelivered") for held in self._held.values())

    def accept(self, content: bytes, sop_instance_uid: str, caller: str, destinations: Sequence[str], request_id: str) -> str | None:
        """Put an instance on the disk for good.

        Returns
        -------
        Its key, or None where it is known already: waiting or settled. One in quarantine is taken up again.

        Raises
        ------
        SpoolFullError
            No room, or another caller is handing in the same instance at this moment.
        OSError
            The disk refuses.
        """
        key = key_of(sop_instance_uid)
        with self._guard:
            # Known is what is on the disk: nobody is told Success for what another thread is still writing.
            if key in self._writing:
                raise SpoolFullError
            if self._is_known(key):
                return None
            self._check_room(len(content))
            self._writing.add(key)
            held = self._held[key] = _Held(len(content), time.time())
        try:
            self._write_instance(key, content, Entry(key, caller, held.received_at, tuple(destinations), request_id))
        except BaseException as error:
            with self._guard:
                del self._held[key]
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise SpoolFullError from error
            raise
        finally:
            with self._guard:
                self._writing.discard(key)
        shutil.rmtree(self._folder / "quarantine" / key, ignore_errors=True)
        return key

    def settle_unread(self, sop_instance_uid: str, outcome: str, reason: str) -> None:
        """Record an instance that nothing is made of; it is not kept."""
        key = key_of(sop_instance_uid)
        with self._guard:
            known = self._is_known(key)
        if not known:
            self._write_record(key, outcome, reason)

    def is_waiting(self, key: str) -> bool:
        """Whether there is still something to do about it."""
        return key in self._held

    def entry(self, key: str) -> Entry:
        """What is known of a waiting instance."""
        return _read_entry(self._folder / "waiting" / key)

    def film(self, key: str) -> bytes:
        """The instance as it was received, a DICOM file."""
        return (self._folder / "waiting" / key / "film.dcm").read_bytes()

    def results(self, key: str) -> list[Path]:
        """The result instances of the endpoint; empty where it has not answered yet."""
        return sorted((self._folder / "waiting" / key / "results").glob("*.dcm"))

    def keep_results(self, key: str, results: Sequence[bytes]) -> None:
        """Keep what the endpoint made, all of it or nothing: whatever is sent more than once is then the same."""
        made = self._folder / "incoming" / f"{key}.{secrets.token_hex(4)}"
        made.mkdir()
        for number, content in enumerate(results):
            _write_durably(made / f"{number}.dcm", content)
        _sync_folder(made)
        made.rename(self._folder / "waiting" / key / "results")
        _sync_folder(self._folder / "waiting" / key)
        with self._guard:
            self._held[key].num_bytes += sum(map(len, results))
            self._held[key].has_results = True

    def update(self, entry: Entry) -> None:
        """Write what has changed about a waiting instance."""
        self._replace(self._folder / "waiting" / entry.key / "entry.json", asdict(entry))

    def settle(self, key: str, outcome: str, reason: str = "") -> None:
        """The instance is done with: its record stays, the instance goes."""
        self._write_record(key, outcome, reason)
        self._drop(key)

    def quarantine(self, entry: Entry, reason: str) -> None:
        """Set aside what can never be done, with the reason."""
        self.update(replace(entry, reason=reason))
        target = self._folder / "quarantine" / entry.key
        shutil.rmtree(target, ignore_errors=True)
        (self._folder / "waiting" / entry.key).rename(target)
        os.utime(target)
        for state in ("waiting", "quarantine"):
            _sync_folder(self._folder / state)
        with self._guard:
            self._held.pop(entry.key, None)

    def sweep(self) -> None:
        """Remove records and quarantined instances that are older than they are to be kept."""
        for state, age_s in (("done", self._retention.done_s), ("quarantine", self._retention.quarantine_s)):
            with os.scandir(self._folder / state) as found:
                old = [Path(item.path) for item in found if item.stat().st_mtime < time.time() - age_s]
            for path in old:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _is_known(self, key: str) -> bool:
        return key in self._held or (self._folder / "done" / f"{key}.json").exists()

    def _check_room(self, num_bytes: int) -> None:
        full = len(self._held) >= self._limits.max_instances
        full |= sum(held.num_bytes for held in self._held.values()) + num_bytes > self._limits.max_spool_bytes
        if full or shutil.disk_usage(self._folder).free - num_bytes < self._limits.min_free_bytes:
            raise SpoolFullError

    def _write_instance(self, key: str, content: bytes, entry: Entry) -> None:
        made = self._folder / "incoming" / f"{key}.{secrets.token_hex(4)}"
        try:
            made.mkdir()
            _write_durably(made / "film.dcm", content)
            _write_durably(made / "entry.json", json.dumps(asdict(entry)).encode())
            _sync_folder(made)
            made.rename(self._folder / "waiting" / key)
            _sync_folder(self._folder / "waiting")
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise

    def _write_record(self, key: str, outcome: str, reason: str) -> None:
        self._replace(self._folder / "done" / f"{key}.json", {"outcome": outcome, "reason": reason, "settled_at": time.time()})

    def _replace(self, path: Path, tree: dict[str, Any]) -> None:
        made = self._folder / "incoming" / secrets.token_hex(8)
        _write_durably(made, json.dumps(tree).encode())
        made.replace(path)
        _sync_folder(path.parent)

    def _drop(self, key: str) -> None:
        # Moved before it is deleted, so that half of an instance is never found among those that wait.
        gone = self._folder / "incoming" / f"{key}.{secrets.token_hex(4)}"
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "waiting" / key).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        with self._guard:
            self._held.pop(key, None)

    def _recover(self) -> None:
        for leftover in (self._folder / "incoming").iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        for folder in (self._folder / "waiting").iterdir():
            if (self._folder / "done" / f"{folder.name}.json").exists():
                self._drop(folder.name)
                continue
            try:
                entry = _read_entry(folder)
                num_bytes = sum(path.stat().st_size for path in folder.rglob("*.dcm"))
                self._held[folder.name] = _Held(num_bytes, entry.received_at, (folder / "results").is_dir())
            except (OSError, ValueError, TypeError, KeyError):
                # Only the disk or another program can have done this.
                logger.error("%s: its spool entry is damaged; set aside", folder.name[:12])
                self.quarantine(Entry(folder.name, "", time.time(), (), uuid.uuid4().hex), "damaged_spool_entry")


def key_of(sop_instance_uid: str) -> str:
    """The name of an instance in the spool and in logs."""
    return hashlib.sha256(sop_instance_uid.encode()).hexdigest()[:40]


def read_status(folder: Path) -> dict[str, Any]:
    """Counts of a spool, read beside a running gateway: waiting, with_results, put off by reason, done by outcome, quarantine by reason."""
    waiting = [_read_quietly(path) for path in (folder / "waiting").glob("*/entry.json")]
    settled = [_read_quietly(path) for path in (folder / "done").glob("*.json")]
    aside = [_read_quietly(path) for path in (folder / "quarantine").glob("*/entry.json")]
    return {
        "waiting": len(waiting),
        "with_results": len(list((folder / "waiting").glob("*/results"))),
        "put_off": dict(Counter(str(tree["reason"]) for tree in waiting if tree.get("reason"))),
        "done": dict(Counter(" ".join(filter(None, (tree.get("outcome"), tree.get("reason")))) for tree in settled)),
        "quarantine": dict(Counter(str(tree.get("reason")) for tree in aside)),
    }


def _read_quietly(path: Path) -> dict[str, Any]:
    """A record, or nothing where it was moved on meanwhile."""
    try:
        tree = json.loads(path.read_bytes())
        return tree if isinstance(tree, dict) else {}
    except (OSError, ValueError):
        return {}


def _read_entry(folder: Path) -> Entry:
    tree = json.loads((folder / "entry.json").read_bytes())
    return Entry(**{**tree, "pending": tuple(tree["pending"])})


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once the folder that holds the name is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
