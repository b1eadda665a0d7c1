"""Draft reports for files: what one process does with its share, and the output folder.

out/results/ID.json     one draft per picture; ID is the content hash of the file
out/overlays/ID.png     on request
out/results.jsonl       every draft of `inputs.csv`, without maps
out/rejects.jsonl       id and reason of every file that gave none
out/inputs.csv          which input became what; the only file that holds input paths
out/run.json            model and settings of the drafts
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssacl.data.dicom import Picture, read_picture
from ssacl.data.storage import open_storage
from ssacl.errors import CheckpointError, DataError, ImageError, SSACLError, StorageError
from ssacl.inference.evidence import evidence_sheet_png
from ssacl.inference.generator import GenerationOptions, ReportGenerator
from ssacl.training.sealed import MANIFEST, check_folder

_SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg", "")
_NOT_FILMS = ("DICOMDIR",)
_MAX_FILE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Outcome:
    """What became of one input file."""

    path: str
    result_id: str
    reason: str = ""
    """Empty: a draft was written."""


class Predictor:
    """Reads files, writes drafts. Runs in this process, or as an actor."""

    def __init__(self, checkpoint_url: str, out_folder: str, options: GenerationOptions, overlays: bool, device: str = "cpu") -> None:
        self._generator = ReportGenerator.load(checkpoint_url, device)
        self._out, self._options, self._overlays = Path(out_folder), options, overlays

    def predict(self, paths: list[str]) -> list[Outcome]:
        """One outcome per path; a file never fails its neighbours."""
        read: list[tuple[str, str, Picture | None, str]] = []
        for path in paths:
            try:
                content, result_id = read_input(path)
                read.append((path, result_id, read_picture(content, Path(path).name), ""))
            except SSACLError as error:
                read.append((path, _safe_id(path), None, str(error)))
        pictures = [picture for _, _, picture, _ in read if picture is not None]
        reasons = iter(self._write(pictures, [result_id for _, result_id, picture, _ in read if picture is not None]))
        return [Outcome(path, result_id, reason if picture is None else next(reasons)) for path, result_id, picture, reason in read]

    def _write(self, pictures: list[Picture], result_ids: list[str]) -> list[str]:
        if not pictures:
            return []
        try:
            drafts = self._generator.generate(pictures, self._options)
        except SSACLError as error:
            if len(pictures) == 1:
                return [str(error)]
            return [self._write([picture], [result_id])[0] for picture, result_id in zip(pictures, result_ids, strict=True)]
        for picture, result_id, draft in zip(pictures, result_ids, drafts, strict=True):
            if self._overlays:
                write_whole(self._out / "overlays" / f"{result_id}.png", evidence_sheet_png(picture.pixels, draft))
            # Last: a result file means that everything of this picture is there.
            write_whole(_result_path(self._out, result_id), json.dumps(draft.to_json(), allow_nan=False).encode())
        return [""] * len(pictures)


def find_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """Files among `inputs`, folders searched, sorted inside each folder, each file once.

    Raises
    ------
    DataError
        An input does not exist.
    """
    found: dict[Path, None] = {}
    for place in map(Path, inputs):
        if place.is_dir():
            files = sorted(path for path in place.rglob("*") if path.is_file() and not path.name.startswith("."))
            found |= dict.fromkeys(path for path in files if path.suffix.lower() in _SUFFIXES and path.name not in _NOT_FILMS)
        elif place.exists():
            found[place] = None
        else:
            raise DataError(f"There is no file or folder {place}.")
    return list(found)


def read_input(path: str | Path) -> tuple[bytes, str]:
    """A file's content, and the hash of it that stands for it in every output.

    Raises
    ------
    ImageError
        It cannot be read, or is larger than any film.
    """
    try:
        if os.path.getsize(path) > _MAX_FILE_BYTES:
            raise ImageError(f"The file is larger than {_MAX_FILE_BYTES // 2**20} MiB; a chest film is smaller. Give single-frame films.")
        content = Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"The file cannot be read ({error.strerror}). Check its permissions.") from error
    return content, _id_of(content)


def _id_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _safe_id(path: str) -> str:
    try:
        return read_input(path)[1]
    except SSACLError:
        return ""


def already_done(out: Path, path: str, overlays: bool) -> Outcome | None:
    """The outcome of an earlier run for `path`, or None where something is missing."""
    result_id = _safe_id(path)
    if not result_id or not _result_path(out, result_id).is_file():
        return None
    if overlays and not (out / "overlays" / f"{result_id}.png").is_file():
        return None
    return Outcome(path, result_id)


def _result_path(out: Path, result_id: str) -> Path:
    return out / "results" / f"{result_id}.json"


def open_out_folder(out: Path, checkpoint_url: str, options: GenerationOptions) -> None:
    """Make the folder, or check that it holds drafts of the same model and settings: two must not be mixed up.

    Raises
    ------
    DataError
        Another model's, or another setting's.
    StorageError
        It cannot be used.
    CheckpointError
        There is no whole model folder at `checkpoint_url`.
    """
    identity = {"manifest_sha256": _manifest_sha256(checkpoint_url), "options": options.model_dump()}
    record = out / "run.json"
    try:
        for folder in ("results", "overlays"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        known = json.loads(record.read_text()) if record.is_file() else None
    except (OSError, ValueError) as error:
        raise StorageError(f"The output folder {out} cannot be used: {error}. Give another --out.") from error
    if known is not None and known != identity:
        raise DataError(f"{out} holds drafts of another model or other settings. Give an empty folder with --out.")
    write_whole(record, json.dumps(identity, indent=1).encode())


def _manifest_sha256(checkpoint_url: str) -> str:
    if "://" in checkpoint_url:
        storage = open_storage(checkpoint_url)
        if not storage.exists(MANIFEST):
            raise CheckpointError(f"There is no {MANIFEST} at {checkpoint_url}: no model folder. Give the one that training printed.")
        return hashlib.sha256(storage.read(MANIFEST)).hexdigest()
    check_folder(Path(checkpoint_url))
    return hashlib.sha256((Path(checkpoint_url) / MANIFEST).read_bytes()).hexdigest()


def write_tables(out: Path, outcomes: Sequence[Outcome]) -> None:
    """results.jsonl, rejects.jsonl and inputs.csv, each whole or not at all."""
    results, rejects, seen = [], [], set()
    for outcome in outcomes:
        if outcome.reason:
            rejects.append(json.dumps({"id": outcome.result_id, "reason": outcome.reason}))
        elif outcome.result_id not in seen:
            seen.add(outcome.result_id)
            tree = json.loads(_result_path(out, outcome.result_id).read_text())
            tree.pop("anatomy_maps")
            tree["sentences"] = [{key: value for key, value in item.items() if key != "evidence"} for item in tree["sentences"]]
            results.append(json.dumps({"id": outcome.result_id, **tree}))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["input", "id", "outcome"])
    writer.writerows([outcome.path, outcome.result_id, "reject" if outcome.reason else "result"] for outcome in outcomes)
    write_whole(out / "results.jsonl", "".join(f"{line}\n" for line in results).encode())
    write_whole(out / "rejects.jsonl", "".join(f"{line}\n" for line in rejects).encode())
    write_whole(out / "inputs.csv", table.getvalue().encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises StorageError where that fails."""
    # The process id keeps two actors that were given copies of one picture apart.
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        work.write_bytes(content)
        os.replace(work, path)
    except OSError as error:
        work.unlink(missing_ok=True)
        raise StorageError(f"Cannot write to {path.parent}: {error.strerror}. Free space or give another --out, then run again.") from error
