"""Films of a downstream task in one form, whatever layout they came in, and the way to their pixels.

Names of films and patients may be patients' own: they stay in memory, and what is written or told holds hashes and counts.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssacl.data.dicom import read_picture
from ssacl.data.records import SPLITS
from ssacl.data.shards import SampleEntry, read_sample
from ssacl.data.storage import Storage
from ssacl.data.transforms import Square, load_square
from ssacl.errors import DataError, ImageError
from ssacl.evaluation.film_answers import file_digest
from ssacl.evaluation.predictions import sample_digest

ABSENT, PRESENT, UNKNOWN = 0, 1, -1
"""What a label says; unknown ones take no part."""
_NUM_READERS = 4
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class TaskFilm:
    """A film and its labels."""

    id: str
    """Its name in the layout; never printed."""
    patient: str
    labels: tuple[int, ...]
    """One per name of the task: `PRESENT`, `ABSENT` or `UNKNOWN`."""
    place: Path | SampleEntry
    """A file, or where the sample lies in its shard."""


@dataclass(frozen=True)
class TaskSet:
    """All films of a task, split by patients.

    Raises
    ------
    DataError
        A split is empty, or a patient is in two.
    """

    layout: str
    names: tuple[str, ...]
    """Findings or structures."""
    splits: Mapping[str, tuple[TaskFilm, ...]] = field(repr=False)
    """train, val, test."""
    split_by: str
    """Where the splits come from, in words."""
    left_out: dict[str, int] = field(default_factory=dict)
    patients_known: bool = True
    storage: Storage | None = field(default=None, repr=False)
    """Where samples lie; none for files."""
    sha256: str = ""
    """Of an ingested data set's index."""

    def __post_init__(self) -> None:
        empty = [name for name in SPLITS if not self.splits.get(name)]
        if empty:
            counts = ", ".join(f"{name} {len(self.splits.get(name, ()))}" for name in SPLITS)
            raise DataError(f"The split '{empty[0]}' has no film ({counts}); training, choosing and testing each need some.")
        splits_of = Counter(patient for name in SPLITS for patient in {film.patient for film in self.splits[name]})
        shared = sum(count > 1 for count in splits_of.values())
        if shared:
            raise DataError(
                f"{shared} patients have films in more than one split; what is tested would have been trained on. Split by patient."
            )

    def digest(self) -> str:
        """sha256 that changes with the films, their labels and their splits; of files, names and sizes count, not pixels."""
        whole = hashlib.sha256(f"{self.layout}|{self.names}|{self.sha256}".encode())
        for name in SPLITS:
            for film in self.splits[name]:
                size = film.place.stat().st_size if isinstance(film.place, Path) else film.place.crc32
                whole.update(f"{name}|{film.id}|{film.labels}|{size}\n".encode())
        return whole.hexdigest()

    def describe(self) -> dict[str, object]:
        """What a card says of the data, as plain JSON."""
        count = {name: len(films) for name, films in self.splits.items()}
        return {
            "sha256": self.digest(),
            "layout": self.layout,
            "split": "test",
            "num_cases": count["test"],
            "films": count,
            "patients": {name: len({film.patient for film in films}) for name, films in self.splits.items()},
            "patients_known": self.patients_known,
            "split_by": self.split_by,
            "left_out": self.left_out,
        }

    def in_short(self) -> dict[str, str]:
        """The same in words, for the printed card."""
        return {
            "layout": self.layout,
            "films": "/".join(str(len(films)) for films in self.splits.values()) + " (train/val/test)",
            "splits by": self.split_by,
            "left out": ", ".join(f"{problem}: {count}" for problem, count in self.left_out.items()) or "nothing",
        }


def label_table(films: Sequence[TaskFilm]) -> NDArray[np.int8]:
    """[n, F] labels."""
    return np.array([film.labels for film in films], dtype=np.int8)


class FilmReader:
    """Gives pixels of films, from files or from a data set's shards."""

    def __init__(self, storage: Storage | None = None) -> None:
        self._storage = storage

    def square(self, film: TaskFilm, size_px: int) -> Square:
        """[size_px, size_px] float32 0..1, the film padded to a square.

        Raises
        ------
        ImageError
            It cannot be read as a frontal film.
        DataError, StorageError
            Its sample is damaged, or storage fails.
        """
        if isinstance(film.place, Path):
            try:
                content = film.place.read_bytes()
            except OSError as error:
                raise ImageError(f"A film cannot be read ({error.strerror}).") from error
            return load_square(read_picture(content, film.place.name).pixels, size_px)[0]
        assert self._storage is not None
        return load_square(read_sample(self._storage, film.place), size_px)[0]

    def digest(self, film: TaskFilm) -> str:
        """The digest of the film's pixels or file, as ingest keeps it."""
        if isinstance(film.place, Path):
            return file_digest(film.place)
        assert self._storage is not None
        return sample_digest(read_sample(self._storage, film.place))

    def batches(self, films: Sequence[TaskFilm], size_px: int, batch_size: int) -> Iterator[NDArray[np.float32]]:
        """[b, size_px, size_px] squares of the films in order, read ahead in threads.

        Raises
        ------
        DataError
            A film cannot be read; nothing is left out, because scores over fewer films would be other scores.
        """
        starts = deque(range(0, len(films), batch_size))
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            ahead: deque[tuple[int, list[Future[Square]]]] = deque()
            try:
                while starts or ahead:
                    while starts and len(ahead) < _BATCHES_AHEAD:
                        start = starts.popleft()
                        ahead.append((start, [pool.submit(self.square, film, size_px) for film in films[start : start + batch_size]]))
                    start, reads = ahead.popleft()
                    yield np.stack([_result(read, start + number, len(films)) for number, read in enumerate(reads)])
            finally:
                pool.shutdown(cancel_futures=True)


def _result(read: Future[Square], number: int, count: int) -> Square:
    try:
        return read.result()
    except ImageError as error:
        raise DataError(f"Film {number + 1} of {count} (in the order of its table) cannot be used: {error}") from error
