"""Channels: names such as `stable` that point to a version. One small object each, replaced whole, with its history inside."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from ssacl.data.lease import Holder, hold_lease
from ssacl.data.storage import MissingObjectError, Storage
from ssacl.errors import RegistryError
from ssacl.registry.versions import open_version

CHANNELS = "channels"
DEFAULT_CHANNELS = ("stable", "canary")
CHANNEL_PATTERN = re.compile(r"[a-z][a-z0-9-]{0,39}")
MAX_HISTORY = 1000
_HOLDER = Holder("promotion", "Wait for it, then run again.", "_channels.lock")


@dataclass(frozen=True)
class Step:
    """What was done to a channel."""

    at: str
    action: Literal["promote", "rollback"]
    version: str
    """Where the channel pointed afterwards."""
    reason: str


@dataclass(frozen=True)
class Channel:
    name: str
    history: tuple[Step, ...]
    """The oldest first."""

    @property
    def version(self) -> str:
        return self.history[-1].version

    def standing(self) -> list[str]:
        """Versions that a rollback goes back through, the present one last."""
        stack: list[str] = []
        for step in self.history:
            if step.action == "promote":
                stack.append(step.version)
            else:
                stack.pop()
        return stack


def read_channel(storage: Storage, name: str) -> Channel:
    """
    Raises
    ------
    RegistryError
        There is no such channel, or its object is damaged.
    """
    _checked(name)
    try:
        tree = json.loads(storage.read(_key(name)))
        return Channel(name, tuple(Step(**step) for step in tree["history"]))
    except MissingObjectError as error:
        raise RegistryError(
            f"{storage.url} has no channel {name}. Point it to a version: ssacl model promote {storage.url} VERSION --channel {name}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(
            f"The channel {name} in {storage.url} is damaged. Restore {_key(name)} from a backup, or promote again."
        ) from error


def promote(storage: Storage, version: str, name: str, reason: str = "") -> Channel:
    """Point a channel to a version whose files were read and found whole.

    Raises
    ------
    RegistryError
        The version is unknown, damaged or not signed as asked for, or the channel's name is not one.
    BusyError
        Somebody else is changing a channel.
    """
    _checked(name)
    open_version(storage, version).check_files()
    with hold_lease(storage, _HOLDER) as lease:
        channel = read_channel(storage, name) if storage.exists(_key(name)) else Channel(name, ())
        if channel.history and channel.version == version:
            return channel
        lease.check()
        return _write(storage, channel, Step(_now(), "promote", version, reason))


def rollback(storage: Storage, name: str, reason: str = "") -> Channel:
    """Point a channel to the version that it pointed to before; again: to the one before that.

    Raises
    ------
    RegistryError
        There is none before, or it is damaged.
    """
    with hold_lease(storage, _HOLDER) as lease:
        channel = read_channel(storage, name)
        standing = channel.standing()
        if len(standing) < 2:
            raise RegistryError(f"The channel {name} has no version before {channel.version}. Promote another one instead.")
        open_version(storage, standing[-2]).manifest()
        lease.check()
        return _write(storage, channel, Step(_now(), "rollback", standing[-2], reason))


def channel_names(storage: Storage) -> list[str]:
    prefix = f"{CHANNELS}/"
    return [item.key.removeprefix(prefix).removesuffix(".json") for item in storage.list(prefix) if item.key.endswith(".json")]


def _write(storage: Storage, channel: Channel, step: Step) -> Channel:
    if len(channel.history) >= MAX_HISTORY:
        raise RegistryError(f"The channel {channel.name} has been moved {MAX_HISTORY} times. Move its object away and promote again.")
    channel = Channel(channel.name, (*channel.history, step))
    tree: dict[str, Any] = {"version": step.version, "history": [vars(each) for each in channel.history]}
    storage.write(_key(channel.name), json.dumps(tree, indent=1).encode("utf-8"))
    return channel


def _key(name: str) -> str:
    return f"{CHANNELS}/{name}.json"


def _checked(name: str) -> None:
    if not CHANNEL_PATTERN.fullmatch(name):
        raise RegistryError(f"'{name[:60]}' is no channel; use a short lower-case name such as {' or '.join(DEFAULT_CHANNELS)}.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
