"""`ssacl data verify`: a data set read again, all of it, and compared with its index and card."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from PIL import Image

from ssacl.data.card import CARD
from ssacl.data.chunks import Part, part_key
from ssacl.data.records import SPLITS
from ssacl.data.shards import ShardEntry, ShardIndex, decode_sample
from ssacl.data.storage import MissingObjectError, Storage
from ssacl.errors import DataError


@dataclass(frozen=True)
class Damage:
    """Something of a data set that is not as its index says."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


def verify(storage: Storage, progress: Callable[[int], None] | None = None) -> list[Damage]:
    """Read every shard again and compare it with the index: presence, size, sha256, members, samples, pictures; then records and card.

    Parameters
    ----------
    progress
        Called with the number of samples looked at since the last call, as `ProgressBar.advance`.

    Raises
    ------
    DataError
        There is no data set, or its index cannot be read or is damaged.
    StorageError
        Storage cannot be reached.
    """
    index = ShardIndex.load(storage)
    damages: list[Damage] = []
    for shard in index.shards:
        damages += _verify_shard(storage, shard)
        if progress is not None:
            progress(shard.count)
    return [*damages, *_verify_records(storage, index), *_verify_card(storage, index)]


def _verify_shard(storage: Storage, shard: ShardEntry) -> Iterator[Damage]:
    try:
        content = storage.read(shard.name)
    except MissingObjectError:
        yield Damage(shard.name, "missing")
        return
    if len(content) != shard.bytes:
        yield Damage(shard.name, f"has {len(content)} bytes instead of {shard.bytes}")
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        yield Damage(shard.name, "sha256 differs")
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            names = tar.getnames()
    except (tarfile.TarError, EOFError):
        yield Damage(shard.name, "is not a readable tar file")
        names = []
    listed = [f"{entry.key}.{suffix}" for entry in shard.samples for suffix in (entry.image_format, "json")]
    if names and len(names) != len(listed):
        yield Damage(shard.name, f"has {len(names)} members instead of {len(listed)}")
    elif names and names != listed:
        yield Damage(shard.name, "has other samples than the index says")
    for entry in shard.samples:
        image = content[entry.image_offset : entry.image_offset + entry.image_size]
        document = content[entry.json_offset : entry.json_offset + entry.json_size]
        if zlib.crc32(document, zlib.crc32(image)) != entry.crc32:
            yield Damage(shard.name, f"sample {entry.key} is not as it was written")
            continue
        try:
            decode_sample(entry.key, image, document)
            with Image.open(io.BytesIO(image), formats=("PNG", "JPEG")) as picture:
                picture.load()
        except (DataError, OSError, SyntaxError, ValueError):
            yield Damage(shard.name, f"sample {entry.key} cannot be read")


def _verify_records(storage: Storage, index: ShardIndex) -> Iterator[Damage]:
    """Without its record a shard can be read, but not be told from studies that are new."""
    entries = {shard.name: shard for shard in index.shards}
    names = (f"{split}-{number:06d}.tar" for split, count in index.num_parts.items() for number in range(count))
    for key, name in ((part_key(name), name) for name in names):
        try:
            shard = Part.from_bytes(storage.read(key)).shard
        except MissingObjectError:
            if name in entries:
                yield Damage(key, "missing")
        except ValueError:
            yield Damage(key, "is damaged")
        else:
            if shard != entries.get(name, shard) or (shard.count and name not in entries):
                yield Damage(key, "tells of another shard than the index")


def _verify_card(storage: Storage, index: ShardIndex) -> Iterator[Damage]:
    """A data set needs no card to be read; one that is there must tell the truth."""
    held = {split: len(index.samples(split)) for split in SPLITS}
    try:
        samples = json.loads(storage.read(CARD))["samples"]
    except MissingObjectError:
        if index.num_parts and any(index.num_parts.values()):
            yield Damage(CARD, "missing")
    except (ValueError, KeyError, TypeError):
        yield Damage(CARD, "is damaged")
    else:
        if samples != held:
            yield Damage(CARD, "counts other samples than the index")
