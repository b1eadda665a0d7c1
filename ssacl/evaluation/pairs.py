"""A file of report pairs: one JSON object per line with `id`, `prediction` and `reference`. It is read as a stream and checked whole.

Errors name kinds, counts and line numbers, never ids or text: an id may be a patient's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ssacl.data.loader import open_split
from ssacl.data.reports import training_text
from ssacl.data.shards import ShardIndex, read_sample
from ssacl.data.storage import open_storage
from ssacl.errors import DataError, SplitError
from ssacl.evaluation.text import tokenise

KEYS = ("id", "prediction", "reference")
MAX_LINE_BYTES = 1 << 20
"""Longer lines are refused: no report has a million letters."""
_SHOWN_LINES = 5


@dataclass(frozen=True)
class ReportPair:
    """A report that a system wrote, and the radiologist's, whole."""

    id: str
    prediction: str
    reference: str


@dataclass(frozen=True)
class PairsFile:
    """A file of pairs that was checked from its first line to its last."""

    path: Path
    sha256: str
    ids: frozenset[str] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self) -> Iterator[ReportPair]:
        """The pairs, in the order of the file.

        Raises
        ------
        DataError
            The file has changed since it was checked.
        """
        digest = hashlib.sha256()
        with _open(self.path) as file:
            for line in _lines(file, digest):
                if line.strip():
                    pair = _parsed(line)
                    if isinstance(pair, str):
                        break
                    yield pair
        if digest.hexdigest() != self.sha256:
            raise DataError(f"{self.path.name} changed while it was read. Leave it alone and run again.")


def check_pairs(path: str | Path) -> PairsFile:
    """Read a file of pairs through and refuse it if any line is wrong.

    Raises
    ------
    DataError
        The file is missing or empty, or has lines that are no pair: each kind with its count and its first line numbers.
    """
    place = Path(path)
    digest, ids, wrong = hashlib.sha256(), set[str](), dict[str, list[int]]()
    num_lines = 0
    with _open(place) as file:
        for number, line in enumerate(_lines(file, digest), start=1):
            if not line.strip():
                continue
            num_lines += 1
            pair = _parsed(line)
            if isinstance(pair, str):
                wrong.setdefault(pair, []).append(number)
            elif pair.id in ids:
                wrong.setdefault("an id that an earlier line has", []).append(number)
            else:
                ids.add(pair.id)
    if wrong:
        kinds = "; ".join(f"{len(lines)} with {kind} (line {_numbers(lines)})" for kind, lines in wrong.items())
        raise DataError(
            f"{place.name}: {sum(map(len, wrong.values()))} of {num_lines} lines are no report pair: {kinds}. Each line must be one JSON "
            f"object with exactly the keys {', '.join(KEYS)}; nothing is left out silently, so mend or remove these lines."
        )
    if not ids:
        raise DataError(f'{place.name} holds no pair. Write one JSON object per line: {{"id": ..., "prediction": ..., "reference": ...}}.')
    return PairsFile(place, digest.hexdigest(), frozenset(ids))


def check_split(pairs: PairsFile, data_url: str, split: str) -> str:
    """Do the pairs answer a split of a data set, each study with a report once? Gives the data set's hash.

    Raises
    ------
    SplitError
        Ids are of another split or of none, or studies have no pair: each with its count.
    DataError, StorageError
        The data set cannot be read.
    """
    storage = open_storage(data_url)
    entries = {entry.key: entry for entry in open_split(storage, split, purpose="evaluation")}
    index = ShardIndex.load(storage)
    split_of = {entry.key: shard.split for shard in index.shards for entry in shard.samples}
    strangers = [split_of.get(key, "none") for key in pairs.ids if key not in entries]
    # A study without a report has nothing to be compared with.
    missing = [key for key in entries if key not in pairs.ids and training_text(read_sample(storage, entries[key]))]
    if strangers or missing:
        counts = [f"{strangers.count(name)} {'of no split' if name == 'none' else f'of {name!r}'}" for name in sorted(set(strangers))]
        said = [f"{len(strangers)} of {len(pairs)} ids are not of the split '{split}' ({', '.join(counts)})"] if strangers else []
        said += [f"{len(missing)} of {len(entries)} studies of '{split}' have no pair"] if missing else []
        raise SplitError(f"{pairs.path.name}: {'; '.join(said)}. Ids must be the sample keys of the split; or leave --data out.")
    return index.digest


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"The pairs file {path} cannot be read ({error.strerror}). Give a JSON-lines file with --pairs.") from error


def _lines(file: BinaryIO, digest: hashlib._Hash) -> Iterator[bytes]:
    """Lines, of which `digest` takes in every byte; of one that is too long only the start is kept."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        digest.update(line)
        rest = line
        while rest and len(line) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
            digest.update(rest)
        yield line


def _parsed(line: bytes) -> ReportPair | str:
    """The pair of a line, or what is wrong with it."""
    if len(line) > MAX_LINE_BYTES:
        return f"more than {MAX_LINE_BYTES} bytes"
    try:
        tree = json.loads(line.decode("utf-8"))
    # Nesting without end is a RecursionError.
    except (ValueError, RecursionError):
        return "no JSON"
    if not isinstance(tree, dict):
        return "JSON that is no object"
    if set(tree) != set(KEYS):
        return "a missing id" if set(tree) == {*KEYS} - {"id"} else "other keys"
    identifier = str(tree["id"]) if isinstance(tree["id"], int) and not isinstance(tree["id"], bool) else tree["id"]
    if identifier is None or (isinstance(identifier, str) and not identifier.strip()):
        return "a missing id"
    if not isinstance(identifier, str):
        return "an id that is no text"
    if not isinstance(tree["prediction"], str) or not isinstance(tree["reference"], str):
        return "a report that is no text"
    if any("\ud800" <= letter <= "\udfff" for text in (identifier, tree["prediction"], tree["reference"]) for letter in text):
        return "letters that are no Unicode"
    if not tokenise(tree["reference"]):
        return "an empty reference"
    return ReportPair(identifier, tree["prediction"], tree["reference"])


def _numbers(lines: list[int]) -> str:
    shown = ", ".join(str(number) for number in lines[:_SHOWN_LINES])
    return shown if len(lines) <= _SHOWN_LINES else f"{shown}, ..."
