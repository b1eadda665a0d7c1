"""Object storage: one small interface over a local folder and S3, with bounded retries and named errors.

Credentials and the endpoint come from the `AWS_*` environment variables alone, so that tasks on other machines need no files.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import urlsplit

from ssacl.data.s3_server import EmbeddedS3, embedded_s3
from ssacl.data.truth_guard import refuse_truth
from ssacl.errors import StorageError

__all__ = ["EmbeddedS3", "FolderStorage", "MissingObjectError", "ObjectInfo", "Patience", "Storage", "embedded_s3", "open_storage"]

_TEMPORARY_SUFFIX = ".tmp"
_TEMPORARY = re.compile(rf"\.(.+)\.\d+\.[0-9a-f]{{8}}{re.escape(_TEMPORARY_SUFFIX)}")
_counting = threading.Lock()


class MissingObjectError(StorageError):
    """The storage works, but holds no object of this key."""


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    """Relative to the storage's root, "/" between parts."""
    size: int
    """Bytes."""


@dataclass
class Patience:
    """For those who have more to lose by an error than by a wait, such as a run that has been training for days."""

    seconds: float = 0.0
    """Longest time that a store which is away is waited for; 0: as long as a person would before looking for the cause."""


class Storage(Protocol):
    """Objects under one root. Writes are atomic: a reader sees the old object, the new one, or none. Instances can be pickled."""

    url: str
    retries: Counter[str]
    """Calls and reads that were tried again, by reason; those of `sub` storages count here too."""
    patience: Patience
    """How long storage that is away is waited for; the same object in `sub` storages."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes [start, end) of an object; exactly as many as asked for.

        Raises
        ------
        MissingObjectError
            No such object.
        StorageError
            Unreachable, refused, or the object is shorter than the range.
        """
        ...

    def write(self, key: str, content: bytes) -> None:
        """Put an object, replacing one of the same key."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Put a file's content as an object."""
        ...

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """All objects whose key starts with `prefix`, sorted by key, at any depth."""
        ...

    def exists(self, key: str) -> bool: ...

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""
        ...

    def sweep(self, is_mine: Callable[[str], bool]) -> None:
        """Remove what killed writers of the keys that `is_mine` names left half-written; nobody may be writing them now."""
        ...

    def sub(self, prefix: str) -> Storage:
        """The storage rooted at `prefix`."""
        ...


def open_storage(url: str | Path) -> Storage:
    """Open a data set or run root: a folder (made at the first write) or `s3://bucket/prefix`. Nothing is contacted yet.

    Raises
    ------
    StorageError
        The URL is empty, or its scheme is neither a path nor s3.
    SplitError
        It names a phantom's measuring truth, which no data set, run or tokenizer is.
    """
    refuse_truth(url)
    text = str(url)
    scheme, separator, _ = text.partition("://")
    if not text:
        raise StorageError("The storage URL is empty; give a folder or s3://bucket/prefix.")
    if not separator:
        return FolderStorage(Path(text))
    if scheme == "file":
        return FolderStorage(Path(urlsplit(text).path))
    if scheme != "s3":
        raise StorageError(f"Storage URL '{text}' has the scheme '{scheme}'; use a folder or s3://bucket/prefix.")
    from ssacl.data.s3_storage import S3Storage

    bucket, _, prefix = text.removeprefix("s3://").partition("/")
    return S3Storage(bucket, prefix)


def count_retry(storage: Storage, reason: str) -> None:
    """Note in `storage.retries` that something is tried again; from any thread."""
    with _counting:
        storage.retries[reason] += 1


def checked_key(key: str) -> str:
    """`key`, if it names an object below the root.

    Raises
    ------
    StorageError
        Empty, absolute, or with "." or ".." parts.
    """
    if not key or key.startswith("/") or key.endswith("/") or any(part in {"", ".", ".."} for part in key.split("/")):
        raise StorageError(f"'{key}' is no object key: use relative names with single slashes and no '..'.")
    return key


class FolderStorage:
    """Objects as files below a folder. Writes go to a hidden temporary file beside the target, then replace it."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root.expanduser()))
        self.url = str(self.root)
        self.retries: Counter[str] = Counter()
        self.patience = Patience()

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        path = self._path(key)
        with _named_os_errors("read", path), path.open("rb") as file:
            file.seek(start)
            content = file.read() if end is None else file.read(end - start)
        if end is not None and len(content) != end - start:
            raise StorageError(
                f"{path} is truncated: bytes {start}-{end} were asked for, it ends at {start + len(content)}. Write it again."
            )
        return content

    def write(self, key: str, content: bytes) -> None:
        with self._replacing(key) as descriptor:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]

    def upload(self, key: str, path: Path) -> None:
        with self._replacing(key) as descriptor, path.open("rb") as source:
            while block := source.read(1 << 20):
                view = memoryview(block)
                while view:
                    view = view[os.write(descriptor, view) :]

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        # Walk only the folder that the prefix points into, however much lies beside it.
        start = self.root / PurePosixPath(prefix).parent if prefix and not prefix.endswith("/") else self.root / prefix
        found = []
        with _named_os_errors("list", start):
            for folder, _, names in os.walk(start):
                for name in names:
                    path = Path(folder) / name
                    key = path.relative_to(self.root).as_posix()
                    if key.startswith(prefix) and not (name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX)):
                        found.append(ObjectInfo(key, path.stat().st_size))
        return sorted(found, key=lambda item: item.key)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _named_os_errors("delete", path):
            path.unlink(missing_ok=True)

    def sweep(self, is_mine: Callable[[str], bool]) -> None:
        with _named_os_errors("clean", self.root):
            for folder, _, names in os.walk(self.root):
                for name in names:
                    left = _TEMPORARY.fullmatch(name)
                    if left and is_mine((Path(folder) / left[1]).relative_to(self.root).as_posix()):
                        (Path(folder) / name).unlink(missing_ok=True)

    def sub(self, prefix: str) -> FolderStorage:
        storage = FolderStorage(self._path(prefix.strip("/")) if prefix.strip("/") else self.root)
        storage.retries, storage.patience = self.retries, self.patience
        return storage

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    @contextmanager
    def _replacing(self, key: str) -> Iterator[int]:
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
        with _named_os_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                try:
                    yield descriptor
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


@contextmanager
def _named_os_errors(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingObjectError(f"Cannot {action} {path}: there is no such file. Check the path, or make the data set first.") from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise StorageError(
                f"Cannot {action} {path}: the disk or quota is full. Free space or choose another place, then run again."
            ) from error
        reason = error.strerror or type(error).__name__
        raise StorageError(f"Cannot {action} {path}: {reason}. Check the path and its permissions, then run again.") from error
