"""API keys: a file of names, hashes and scopes. The keys themselves are shown once, when they are made, and kept nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from serve.service_settings import Scope
from ssacl.errors import ConfigError, StorageError

PREFIX = "ssacl_"
_MAX_FILE_BYTES = 1 << 20


class ApiKey(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = Field(min_length=1)
    expires: datetime | None = None


_KEYS = TypeAdapter(list[ApiKey])


class KeyFile:
    """The keys of a file; a change of the file counts from the next request on, so that a key can be withdrawn while serving.

    Raises
    ------
    ConfigError
        The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._keys: dict[str, ApiKey] = {}
        self._refresh()

    def find(self, key: str) -> ApiKey | None:
        """The entry of a key that is valid now."""
        self._refresh()
        found = self._keys.get(hash_of(key))
        if found is None or (found.expires is not None and found.expires.timestamp() <= time.time()):
            return None
        return found

    def _refresh(self) -> None:
        try:
            state = self._path.stat()
        except OSError:
            state = None
        stamp = (state.st_mtime_ns, state.st_size) if state else None
        if stamp != self._stamp or stamp is None:
            self._keys, self._stamp = {key.sha256: key for key in read_keys(self._path)}, stamp


def hash_of(key: str) -> str:
    """Plain SHA-256: keys hold 256 random bits, so there is nothing to guess that a slow hash would protect."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> list[ApiKey]:
    """
    Raises
    ------
    ConfigError
        The file is not there, too long, or no list of keys.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"The file of API keys {path} is longer than {_MAX_FILE_BYTES} bytes. Is it another file?")
        return _KEYS.validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"The file of API keys {path} cannot be read. `ssacl access add` makes one.") from error
    except ValidationError as error:
        # Its text would quote the file.
        where = ", ".join(sorted({".".join(map(str, item["loc"])) or "file" for item in error.errors()}))
        raise ConfigError(f"The file of API keys {path} is damaged at: {where}. Mend it, or make one by `ssacl access add`.") from None


def add_key(path: Path, name: str, scopes: list[str], expires: datetime | None = None) -> str:
    """Make a key, write its hash to the file, and return it: it cannot be had again.

    Raises
    ------
    ConfigError
        The name is taken, or name or scope is not allowed.
    StorageError
        The file cannot be written.
    """
    keys = read_keys(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise ConfigError(f"There is a key named {name} already. Choose another name, or `ssacl access revoke` it first.")
    made = PREFIX + secrets.token_urlsafe(32)
    try:
        entry = ApiKey.model_validate({"name": name, "sha256": hash_of(made), "scopes": scopes, "expires": expires})
    except ValidationError as error:
        raise ConfigError(
            f"No such key: names are letters, digits, dot, dash and underscore; scopes are {', '.join(get_args(Scope))}."
        ) from error
    _write(path, [*keys, entry])
    return made


def revoke_key(path: Path, name: str) -> None:
    """
    Raises
    ------
    ConfigError
        There is no such key.
    StorageError
        The file cannot be written.
    """
    keys = read_keys(path)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        raise ConfigError(f"There is no key named {name} in {path}; it holds: {', '.join(key.name for key in keys) or 'none'}.")
    _write(path, left)


def _write(path: Path, keys: list[ApiKey]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    text = json.dumps(_KEYS.dump_python(keys, mode="json", exclude_none=True), indent=1)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text + "\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"The file of API keys {path} cannot be written ({error.strerror}). Give a place that this user may write."
        ) from error
