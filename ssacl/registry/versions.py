"""Versions of models: sealed model folders, copied once under their content's hash and never changed.

    versions/VERSION/model/...       the model folder with its manifest (sha256 of every file)
    versions/VERSION/MODEL_CARD.md   what it is, was measured to do, and must not be used for
    versions/VERSION/record.sig      Ed25519 signature of the record, where a key was named
    versions/VERSION/record.json     hashes of manifest and card, metrics, origin; written last: without it there is no version

The record is signed, and vouches for the manifest, which vouches for the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ssacl
from ssacl.data.storage import MissingObjectError, Storage
from ssacl.errors import CheckpointError, RegistryError
from ssacl.registry.signing import check_signature, sign
from ssacl.training.sealed import MANIFEST, check_folder, parse_manifest, upload_folder

VERSIONS, MODEL = "versions", "model"
RECORD, SIGNATURE, CARD = "record.json", "record.sig", "MODEL_CARD.md"
VERSION_PATTERN = re.compile(r"[0-9a-f]{12}")
MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class Version:
    """A registered version, its record and signature read and checked; its files only by `check_files`."""

    version: str
    record: dict[str, Any]
    signature: str
    """As of `check_signature`."""
    storage: Storage
    """Rooted at the version."""

    @property
    def model_url(self) -> str:
        return self.storage.sub(MODEL).url

    def manifest(self) -> dict[str, Any]:
        """The model folder's manifest, if it is the one that was registered.

        Raises
        ------
        RegistryError
            It is another one or missing.
        """
        content = _read(self.storage, f"{MODEL}/{MANIFEST}", self.version)
        self._same("manifest_sha256", content, "its manifest")
        return parse_manifest(content, self.model_url)

    def card(self) -> str:
        """The model card, checked likewise."""
        content = _read(self.storage, CARD, self.version)
        self._same("card_sha256", content, "its model card")
        return content.decode("utf-8")

    def check_files(self) -> int:
        """Read every file and compare its sha256; gives the number of files.

        Raises
        ------
        RegistryError
            A file is missing or differs.
        """
        self.card()
        files = self.manifest()["files"]
        for name, expected in files.items():
            if hashlib.sha256(_read(self.storage, f"{MODEL}/{name}", self.version)).hexdigest() != expected:
                raise _damaged(self.version, name)
        return len(files)

    def _same(self, key: str, content: bytes, what: str) -> None:
        if hashlib.sha256(content).hexdigest() != self.record.get(key):
            raise _damaged(self.version, what)


def register(
    storage: Storage, folder_storage: Storage, folder: Path, card: str | None = None, metrics: Mapping[str, Any] | None = None
) -> Version:
    """Copy a sealed model folder into the registry at `storage`; what is there already is left as it is.

    Parameters
    ----------
    folder_storage : where it comes from, for its record.
    folder : local path of the folder, verified.
    card : Markdown text; none: one is written from the manifest.
    metrics : what was measured beside the manifest's metrics; it goes into record and written card.

    Raises
    ------
    CheckpointError
        The folder is incomplete, damaged or no model.
    """
    manifest = check_folder(folder)
    if "model_version" not in manifest:
        raise CheckpointError(f"{folder_storage.url} is a training checkpoint, not a model folder. Give the run's model/ folder.")
    manifest_sha256 = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    version, measured = manifest_sha256[:12], {**manifest.get("metrics", {}), **(metrics or {})}
    place = storage.sub(f"{VERSIONS}/{version}")
    if not place.exists(RECORD):
        text = (card or write_card(version, {**manifest, "metrics": measured})).encode("utf-8")
        upload_folder(folder, place, MODEL)
        place.write(CARD, text)
        record = {
            "version": version,
            "model_version": manifest["model_version"],
            "manifest_sha256": manifest_sha256,
            "card_sha256": hashlib.sha256(text).hexdigest(),
            "registered_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "registered_with": ssacl.__version__,
            "source": folder_storage.url,
            "metrics": measured,
        }
        content = json.dumps(record, indent=1, sort_keys=True).encode("utf-8")
        if (signature := sign(content)) is not None:
            place.write(SIGNATURE, signature)
        place.write(RECORD, content)
    return open_version(storage, version)


def open_version(storage: Storage, version: str) -> Version:
    """A version of the registry at `storage`.

    Raises
    ------
    RegistryError
        Unknown, damaged, or without the signature that is asked for.
    """
    place = storage.sub(f"{VERSIONS}/{version}")
    try:
        content = place.read(RECORD)
    except MissingObjectError as error:
        raise RegistryError(f"{storage.url} has no version {version}. ssacl model list {storage.url} lists them.") from error
    try:
        record = json.loads(content[:MAX_RECORD_BYTES])
    except ValueError as error:
        raise _damaged(version, RECORD) from error
    signature = place.read(SIGNATURE) if place.exists(SIGNATURE) else None
    told = check_signature(content, signature, f"Version {version}")
    # A record that was copied to another place would be signed as well.
    if not isinstance(record, dict) or record.get("version") != version:
        raise _damaged(version, RECORD)
    return Version(version, record, told, place)


def version_names(storage: Storage) -> list[str]:
    """Every version that is whole."""
    keys = [item.key.split("/") for item in storage.list(f"{VERSIONS}/")]
    return sorted({key[1] for key in keys if len(key) == 3 and key[2] == RECORD and VERSION_PATTERN.fullmatch(key[1])})


def write_card(version: str, manifest: dict[str, Any]) -> str:
    """A model card from what the manifest knows."""
    metrics = "\n".join(f"- {name}: {value}" for name, value in sorted(manifest.get("metrics", {}).items())) or "- none recorded"
    provenance = "\n".join(f"- {name}: {value}" for name, value in sorted(manifest.get("provenance", {}).items())) or "- none recorded"
    return (
        f"# Model {version}\n\nResearch software, not a medical device: every report is a preliminary, unverified draft.\n\n"
        f"Weights {manifest['model_version']}, written by ssacl {manifest.get('code_version', 'unknown')}.\n\n"
        f"## Measured\n{metrics}\n\n## Origin\n{provenance}\n"
    )


def _read(storage: Storage, key: str, version: str) -> bytes:
    try:
        return storage.read(key)
    except MissingObjectError as error:
        raise _damaged(version, key) from error


def _damaged(version: str, what: str) -> RegistryError:
    return RegistryError(f"Version {version} is damaged: {what} is missing or not what was registered. Restore it, or register it again.")
