"""Samples by range reads, ahead of their use: those that lie side by side come in one read, within a budget of memory.

What is read is held until it is taken. When the budget is spent, only samples that a batch waits for are read: slower, never wrong.
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ssacl.data.records import Sample
from ssacl.data.shards import SampleEntry, decode_sample, read_sample
from ssacl.data.split_index import SplitIndex
from ssacl.data.storage import Storage, count_retry
from ssacl.errors import DataError

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""Epoch and position in it: each is taken once."""
MAX_SPAN_BYTES = 8 << 20
_MAX_GAP_BYTES = 32 << 10
"""Reading across a gap of this size is cheaper than asking again."""


@dataclass(frozen=True)
class Wanted:
    place: Place
    number: int
    """Of the sample in its split."""


class SampleCache:
    """Encoded samples kept for later epochs; what was read first stays, up to a size."""

    def __init__(self, num_bytes: int) -> None:
        self._samples: dict[int, Sample] = {}
        self._left = num_bytes
        self._lock = threading.Lock()

    def get(self, number: int) -> Sample | None:
        return self._samples.get(number)

    def offer(self, number: int, sample: Sample, num_bytes: int) -> None:
        with self._lock:
            if num_bytes <= self._left and number not in self._samples:
                self._samples[number] = sample
                self._left -= num_bytes


class SpanReader:
    """Reads what `request` names in its own threads, and gives it out once by `take`.

    Parameters
    ----------
    budget_bytes
        Of samples that are read, or being read, before a batch asks for them.
    """

    def __init__(self, storage: Storage, index: SplitIndex, cache: SampleCache, num_threads: int, budget_bytes: int) -> None:
        self._storage, self._index, self._cache = storage, index, cache
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="ssacl-reader")
        self._budget = budget_bytes
        self._coming: dict[Place, Future[dict[Place, Sample | DataError]]] = {}
        self._sizes: dict[Place, int] = {}
        self._held = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Of samples that are read, or being read, and not taken."""
        return self._held

    def is_coming(self, place: Place) -> bool:
        """Whether it was asked for and not yet taken."""
        return place in self._coming

    def request(self, now: Sequence[Wanted], later: Iterable[Wanted] = ()) -> list[Future[dict[Place, Sample | DataError]]]:
        """Begin to read what is not already coming; one thread may call it. The futures are done when all of `now` can be taken.

        `later` is what lies beside it and will be asked for later: it is read along as far as the budget goes.
        """
        missing = [self._enter(wanted) for wanted in now if wanted.place not in self._coming]
        for wanted in later:
            if wanted.place not in self._coming and self._held + self._index[wanted.number].image_size <= self._budget:
                missing.append(self._enter(wanted))
        for span in self._spans([pair for pair in missing if pair is not None]):
            future = self._pool.submit(self._read, span)
            for wanted, _ in span:
                self._coming[wanted.place] = future
        return list({id(future): future for future in (self._coming[wanted.place] for wanted in now)}.values())

    def take(self, place: Place) -> Sample | DataError:
        """What was read for a place, or why it is damaged.

        Raises
        ------
        StorageError
            Storage cannot be reached.
        """
        future = self._coming.pop(place)
        with self._lock:
            self._held -= self._sizes.pop(place)
        return future.result().pop(place)

    def close(self) -> None:
        """Give up what has not begun. What is being read ends in the background."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _enter(self, wanted: Wanted) -> tuple[Wanted, SampleEntry] | None:
        entry = self._index[wanted.number]
        known = self._cache.get(wanted.number)
        # Its future comes when the span is known; the mark keeps it from being asked for twice.
        ready: Future[dict[Place, Sample | DataError]] = Future()
        self._coming[wanted.place] = ready
        size = 0 if known is not None else entry.json_offset + entry.json_size - entry.image_offset
        with self._lock:
            self._sizes[wanted.place] = size
            self._held += size
        if known is None:
            return wanted, entry
        ready.set_result({wanted.place: known})
        return None

    def _spans(self, missing: list[tuple[Wanted, SampleEntry]]) -> list[list[tuple[Wanted, SampleEntry]]]:
        spans: list[list[tuple[Wanted, SampleEntry]]] = []
        for wanted, entry in sorted(missing, key=lambda pair: (pair[1].shard, pair[1].image_offset)):
            if spans:
                first, last = spans[-1][0][1], spans[-1][-1][1]
                gap = entry.image_offset - (last.json_offset + last.json_size)
                length = entry.json_offset + entry.json_size - first.image_offset
                if entry.shard == first.shard and gap <= _MAX_GAP_BYTES and length <= MAX_SPAN_BYTES:
                    spans[-1].append((wanted, entry))
                    continue
            spans.append([(wanted, entry)])
        return spans

    def _read(self, span: list[tuple[Wanted, SampleEntry]]) -> dict[Place, Sample | DataError]:
        start, last = span[0][1].image_offset, span[-1][1]
        content = memoryview(self._storage.read(last.shard, start, last.json_offset + last.json_size))
        return {wanted.place: self._sample(wanted.number, entry, content[entry.image_offset - start :]) for wanted, entry in span}

    def _sample(self, number: int, entry: SampleEntry, content: memoryview) -> Sample | DataError:
        gap = entry.json_offset - entry.image_offset
        # Copies: a view would keep the whole span in memory until its last sample is taken.
        image, document = bytes(content[: entry.image_size]), bytes(content[gap : gap + entry.json_size])
        try:
            if zlib.crc32(document, zlib.crc32(image)) == entry.crc32:
                sample = decode_sample(entry.key, image, document)
            else:
                # Ranges have no checksum of the server's: it may have been damaged on the way.
                count_retry(self._storage, "wrong_bytes")
                sample = read_sample(self._storage, entry)
        except DataError as error:
            return error
        self._cache.offer(number, sample, len(image) + 2 * len(document) + 1024)
        return sample
