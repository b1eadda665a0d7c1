"""Folders that are complete or invisible: a manifest with the sha256 of every file, written last, here and in object storage."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssacl.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    from ssacl.data.storage import Storage

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_HASH_BLOCK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """Relative POSIX path -> sha256 of every file below `folder`, the manifest left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {name: sha256_of(path) for path in files if (name := path.relative_to(folder).as_posix()) != MANIFEST}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Write into a hidden sibling that takes the place of `folder` only when the block ends without an error.

    Raises
    ------
    StorageError
        The disk is full or refuses.
    """
    parent = folder.absolute().parent
    work: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=parent))
        yield work
        _replace_folder(work, folder)
    except OSError as error:
        raise StorageError(
            f"Cannot write the folder {folder}: {error.strerror}. Free space or choose another place, then run again."
        ) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _replace_folder(work: Path, folder: Path) -> None:
    if folder.exists():
        # A folder that is not empty cannot be replaced in one call; the old one steps aside first and is dropped afterwards.
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.absolute().parent))
        os.replace(folder, aside / "old")
        os.replace(work, folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(work, folder)


def seal(folder: Path, entries: Mapping[str, Any], hashes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write the manifest of `folder`: `entries` plus the files' sha256. Nothing may be added to the folder afterwards.

    `hashes` replaces the hashes of what lies in the folder, where several machines each hold a part.
    """
    manifest = {**entries, "files": dict(hashes) if hashes is not None else folder_hashes(folder)}
    path = folder / MANIFEST
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(partial, path)
    return manifest


def parse_manifest(content: bytes, name: str) -> dict[str, Any]:
    """The manifest tree; `name` is for the error text.

    Raises
    ------
    CheckpointError
        The content is no manifest.
    """
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{name}/{MANIFEST} is damaged (not JSON). Copy or export the folder again.") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{name}/{MANIFEST} lists no files: it was not written by ssacl. Give a folder that `ssacl train` wrote.")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder.

    Raises
    ------
    CheckpointError
        There is none, so the folder is incomplete; or it is damaged.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except FileNotFoundError as error:
        what = "is incomplete: it has no manifest.json, which is written last" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"The checkpoint folder {folder} {what}. Take an earlier one, or run the training command again.") from error
    return parse_manifest(content, str(folder))


def check_folder(folder: Path) -> dict[str, Any]:
    """Verify every file of a sealed folder against its manifest; gives the manifest.

    Raises
    ------
    CheckpointError
        A file is missing or differs.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"The checkpoint folder {folder} is incomplete: {name} is missing. Copy it again.")
        if sha256_of(path) != expected:
            raise CheckpointError(
                f"The checkpoint folder {folder} is damaged: the sha256 of {name} differs from the manifest. Copy it again."
            )
    return manifest


def upload_folder(folder: Path, storage: Storage, prefix: str) -> None:
    """Copy a sealed folder to `storage` under `prefix`, the manifest last: readers see all of it or none.

    Raises
    ------
    CheckpointError
        The folder is not sealed.
    StorageError
        Storage refused.
    """
    manifest = read_manifest(folder)
    target = storage.sub(prefix)
    if target.exists(MANIFEST):
        # Else the old manifest would vouch for a mixture of old and new files while they are being replaced.
        target.delete(MANIFEST)
    for name in manifest["files"]:
        target.upload(name, folder / name)
    target.upload(MANIFEST, folder / MANIFEST)


def download_folder(storage: Storage, prefix: str, into: Path) -> Path:
    """Fetch a sealed folder into the new folder `into`, verifying every sha256; gives `into`.

    Raises
    ------
    CheckpointError
        The folder is incomplete or damaged in storage.
    StorageError
        Storage cannot be reached, or the disk is full.
    """
    source = storage.sub(prefix) if prefix else storage
    if not source.exists(MANIFEST):
        raise CheckpointError(f"{source.url} holds no complete checkpoint (no {MANIFEST}). Check the address, or finish the training run.")
    content = source.read(MANIFEST)
    manifest = parse_manifest(content, source.url)
    with new_folder(into) as work:
        for name, expected in manifest["files"].items():
            path = (work / name).resolve()
            if not path.is_relative_to(work.resolve()):
                raise CheckpointError(f"{source.url}/{MANIFEST} lists a file outside its folder; refuse to fetch it.")
            if not source.exists(name):
                raise CheckpointError(f"{source.url} is incomplete: {name} is missing. Upload or export it again.")
            body = source.read(name)
            if hashlib.sha256(body).hexdigest() != expected:
                raise CheckpointError(
                    f"{source.url} is damaged: the sha256 of {name} differs from the manifest. Upload or export it again."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        (work / MANIFEST).write_bytes(content)
    return into
