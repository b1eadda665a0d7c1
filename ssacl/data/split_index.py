"""The samples of one split, for who must hold all of them: columns instead of objects, some 60 bytes a sample.

Only the loader's own process holds it; decoding processes are handed samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ssacl.data.shards import SampleEntry


class SplitIndex:
    """What `ShardIndex.samples(split)` gives, by number, compact. Entries of a shard follow one another, in the order of their bytes."""

    def __init__(self, entries: Sequence[SampleEntry]) -> None:
        count = len(entries)
        names = dict.fromkeys(entry.shard for entry in entries)
        formats = dict.fromkeys(entry.image_format for entry in entries)
        self._shards, self._formats = tuple(names), tuple(formats)
        shard_numbers = {name: number for number, name in enumerate(names)}
        format_numbers = {name: number for number, name in enumerate(formats)}
        self.split = entries[0].split if count else ""
        self._keys = np.array([entry.key.encode() for entry in entries])
        self._shard = np.fromiter((shard_numbers[entry.shard] for entry in entries), np.uint32, count)
        self._format = np.fromiter((format_numbers[entry.image_format] for entry in entries), np.uint8, count)
        self._start = np.fromiter((entry.image_offset for entry in entries), np.int64, count)
        self._image_size = np.fromiter((entry.image_size for entry in entries), np.uint32, count)
        self._json_gap = np.fromiter((entry.json_offset - entry.image_offset for entry in entries), np.uint32, count)
        self._json_size = np.fromiter((entry.json_size for entry in entries), np.uint32, count)
        self._crc32 = np.fromiter((entry.crc32 for entry in entries), np.uint32, count)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> SampleEntry:
        start = int(self._start[number])
        return SampleEntry(
            key=self._keys[number].decode(),
            shard=self._shards[self._shard[number]],
            split=self.split,
            image_format=self._formats[self._format[number]],
            image_offset=start,
            image_size=int(self._image_size[number]),
            json_offset=start + int(self._json_gap[number]),
            json_size=int(self._json_size[number]),
            crc32=int(self._crc32[number]),
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the columns."""
        return sum(column.nbytes for column in vars(self).values() if isinstance(column, np.ndarray))

    def fingerprint(self) -> str:
        """sha256 over all keys in order."""
        digest = hashlib.sha256()
        for key in self._keys:
            digest.update(key + b"\n")
        return digest.hexdigest()
