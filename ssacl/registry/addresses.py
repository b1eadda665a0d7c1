"""`REGISTRY@stable` and `REGISTRY@VERSION`: addresses of models wherever a checkpoint is asked for."""

from __future__ import annotations

from pathlib import Path

from ssacl.data.storage import open_storage
from ssacl.registry.channels import CHANNEL_PATTERN, read_channel
from ssacl.registry.versions import VERSION_PATTERN, Version, open_version


def find_version(registry: str, name: str) -> Version:
    """A version by its name, or by the channel (with or without `@`) that points to it.

    Raises
    ------
    RegistryError
        There is no such version or channel, or it is damaged.
    """
    storage = open_storage(registry)
    name = name.removeprefix("@")
    return open_version(storage, name if VERSION_PATTERN.fullmatch(name) else read_channel(storage, name).version)


def resolve_model(address: str) -> str:
    """The model folder's URL that an address means now; other addresses come back unchanged.

    The record and the manifest are checked here, each file when it is loaded.

    Raises
    ------
    RegistryError
        As `find_version`.
    """
    registry, separator, name = address.rpartition("@")
    if not separator or not registry or not (CHANNEL_PATTERN.fullmatch(name) or VERSION_PATTERN.fullmatch(name)):
        return address
    # A folder may well have an "@" in its name.
    if "://" not in address and Path(address).exists():
        return address
    version = find_version(registry, name)
    version.manifest()
    return version.model_url
