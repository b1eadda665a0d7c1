"""The phantom's truth on disk: masks and findings, beside the data and out of reach of training.

A tree `data/` has its truth in the sibling folder `data_truth/`, so that no walk over the data meets it. Only
`ssacl.evaluation` may open it. Entries are found by the pixel digest that ingest keeps as provenance.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.anatomy import NODES
from ssacl.data import truth_guard
from ssacl.errors import DataError
from ssacl.phantom.findings import TrueFinding
from ssacl.phantom.geometry import Mask
from ssacl.phantom.study import StudyTruth

TRUTH_SUFFIX = truth_guard.TRUTH_SUFFIX
"""A data folder's name + this is its truth's."""
MANIFEST = truth_guard.TRUTH_MANIFEST
"""Written last: settings of the tree, and digest -> study."""


def truth_folder(folder: str | Path) -> Path:
    """The truth folder of a data folder (or of itself)."""
    path = Path(folder)
    return path if path.name.endswith(TRUTH_SUFFIX) else path.with_name(path.name + TRUTH_SUFFIX)


class PhantomTruth(Mapping[str, StudyTruth]):
    """Pixel digest -> `StudyTruth`, read from disk when asked for.

    The digest is the SHA-256 of the stored PixelData bytes of the DICOM file, in hex.
    """

    def __init__(self, folder: Path, entries: dict[str, dict[str, str]]) -> None:
        self._folder, self._entries = folder, entries

    @classmethod
    def load(cls, folder: str | Path) -> PhantomTruth:
        """The truth of a phantom tree; `folder` is the data folder or its truth folder.

        Raises
        ------
        DataError
            There is no complete truth there.
        """
        path = truth_folder(folder)
        manifest = read_manifest(path)
        if not manifest.get("complete"):
            raise DataError(f"{path} holds no complete phantom truth. Write the tree with `ssacl data phantom`.")
        return cls(path, manifest["studies"])

    def __getitem__(self, digest: str) -> StudyTruth:
        entry = self._entries[digest]
        return decode_truth((self._folder / entry["file"]).read_bytes())

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def split(self, name: str) -> list[str]:
        """Digests of a split, in study order."""
        return [digest for digest, entry in self._entries.items() if entry["split"] == name]


def encode_truth(truth: StudyTruth) -> bytes:
    """One study's truth as an npz file: packed and deflated masks, findings as JSON."""
    found = [item.mask for item in truth.findings if item.mask is not None]
    assert len(found) == len(truth.findings), "truth with findings but without their masks"
    size = truth.masks.shape[-1]
    every = np.concatenate([truth.masks, np.array(found, dtype=bool).reshape(-1, size, size)])
    head = {
        "study_id": truth.study_id,
        "split": truth.split,
        "size_px": size,
        "findings": [item.to_json() for item in truth.findings],
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        head=np.frombuffer(json.dumps(head).encode(), dtype=np.uint8),
        masks=np.frombuffer(zlib.compress(np.packbits(every, axis=-1).tobytes(), 1), dtype=np.uint8),
    )
    return buffer.getvalue()


def decode_truth(content: bytes) -> StudyTruth:
    """The inverse of `encode_truth`.

    Raises
    ------
    DataError
        The file is damaged.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            head: dict[str, Any] = json.loads(arrays["head"].tobytes())
            packed = np.frombuffer(zlib.decompress(arrays["masks"].tobytes()), dtype=np.uint8)
        size = int(head["size_px"])
        every: NDArray[np.bool_] = np.unpackbits(packed.reshape(-1, size, (size + 7) // 8), axis=-1, count=size).astype(bool)
        findings = [_finding(item) for item in head["findings"]]
        if len(every) != len(NODES) + len(findings):
            raise ValueError("mask count")
    except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError("A phantom truth file is damaged. Delete the truth folder and write the tree again.") from error
    masks: Mask = every[: len(NODES)]
    found = tuple(dataclasses.replace(item, mask=mask) for item, mask in zip(findings, every[len(NODES) :], strict=True))
    return StudyTruth(str(head["study_id"]), str(head["split"]), found, masks)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The truth folder's manifest; empty when there is none.

    Raises
    ------
    DataError
        It is there but cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read. Delete the phantom's folders and write them again.") from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path} is not a phantom manifest. Delete the phantom's folders and write them again.")
    return manifest


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _finding(item: dict[str, Any]) -> TrueFinding:
    return TrueFinding(**{**item, "zones": tuple(item["zones"]), "place": tuple(item["place"])})
