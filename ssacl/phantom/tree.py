"""Writes a phantom data set as a hospital export: DICOM files and report texts, and the truth in a sibling folder."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from ssacl.errors import ConfigError, DataError, StorageError
from ssacl.phantom.dicom import dicom_bytes
from ssacl.phantom.study import generate_study
from ssacl.phantom.truth import MANIFEST, TRUTH_SUFFIX, encode_truth, read_manifest, truth_folder, write_file

IMAGE_NAME, REPORT_NAME = "IMAGE.dcm", "report.txt"
FORMAT_VERSION = 1
"""Raised when the generator changes what it draws: a tree of another version is not continued."""


@dataclass(frozen=True)
class TreeSummary:
    """What `write_dicom_tree` left on disk."""

    folder: Path
    truth: Path
    num_studies: int
    num_per_split: dict[str, int]


def write_dicom_tree(
    folder: str | Path,
    num_studies: int,
    seed: int,
    size_px: int = 256,
    num_processes: int = 2,
    progress: Callable[[int], None] | None = None,
) -> TreeSummary:
    """Write studies 0..num_studies-1 of data set `seed`.

    `folder/{split}/PATIENT/STUDY/IMAGE.dcm` and `report.txt` beside it; the truth in the sibling folder
    (`PhantomTruth.load(folder)`). A tree of the same settings is kept, or written to its end if it was interrupted.

    Parameters
    ----------
    progress
        Called with the number of studies written since the last call, as `ProgressBar.advance`.

    Raises
    ------
    ConfigError
        A number is out of range, or the folder's name ends in "_truth".
    DataError
        The folder holds something else already.
    StorageError
        The disk refuses or is full.
    """
    target = Path(folder)
    if num_studies < 1 or num_processes < 1 or seed < 0:
        raise ConfigError(
            f"A phantom tree needs num_studies >= 1, num_processes >= 1, seed >= 0; got {num_studies}, {num_processes}, {seed}."
        )
    if target.name.endswith(TRUTH_SUFFIX):
        raise ConfigError(f"A data folder's name must not end in '{TRUTH_SUFFIX}', which marks the truth; choose another name.")
    truth = truth_folder(target)
    settings = {"format": FORMAT_VERSION, "seed": seed, "num_studies": num_studies, "size_px": size_px}
    manifest = read_manifest(truth)
    if (manifest and manifest.get("settings") != settings) or (not manifest and _holds_something(target, truth)):
        raise DataError(f"{target} (or {truth.name} beside it) holds other data. Choose an empty folder, or delete both.")
    try:
        if not manifest.get("complete"):
            write_file(truth / MANIFEST, _json({"settings": settings, "complete": False}))
            work = partial(_write_studies, target, truth, seed, size_px)
            studies: dict[str, dict[str, str]] = {}
            for part in _run(work, _chunks(num_studies), num_processes):
                studies.update(part)
                if progress is not None:
                    progress(len(part))
            manifest = {"settings": settings, "complete": True, "studies": studies}
            write_file(truth / MANIFEST, _json(manifest))
        elif progress is not None:
            progress(num_studies)
    except OSError as error:
        raise StorageError(f"Cannot write the phantom to {target}: {error.strerror}. Free space or choose another folder.") from error
    counts = {"train": 0, "val": 0, "test": 0}
    for entry in manifest["studies"].values():
        counts[entry["split"]] += 1
    return TreeSummary(target, truth, num_studies, counts)


def _write_studies(folder: Path, truth: Path, seed: int, size_px: int, indices: list[int]) -> dict[str, dict[str, str]]:
    entries = {}
    for index in indices:
        study = generate_study(seed, index, size_px)
        assert study.truth is not None, "truth was asked for"
        content, digest = dicom_bytes(study)
        place = folder / study.split / study.patient_id / study.study_id
        name = f"{study.split}/{digest}.npz"
        write_file(truth / name, encode_truth(study.truth))
        write_file(place / REPORT_NAME, study.report.encode())
        write_file(place / IMAGE_NAME, content)
        entries[digest] = {"study_id": study.study_id, "split": study.split, "file": name}
    return entries


def _run(
    work: Callable[[list[int]], dict[str, dict[str, str]]], chunks: Iterable[list[int]], num_processes: int
) -> Iterator[dict[str, dict[str, str]]]:
    if num_processes == 1:
        yield from map(work, chunks)
        return
    # Not fork: the caller may hold threads of torch or Ray.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(work, chunks)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _chunks(num_studies: int, size: int = 10) -> Iterator[list[int]]:
    indices = iter(range(num_studies))
    while chunk := list(islice(indices, size)):
        yield chunk


def _holds_something(*folders: Path) -> bool:
    return any(folder.exists() and (not folder.is_dir() or any(folder.iterdir())) for folder in folders)


def _json(tree: object) -> bytes:
    return json.dumps(tree, indent=1).encode()
