"""WebDataset shards and their index: written whole or not at all, read at an offset; `ssacl.data.verification` checks them.

train-000000.tar   KEY.jpg KEY.json KEY.jpg KEY.json ...
index.json         every shard (split, count, bytes, sha256) and where each sample lies in it; written last
dataset_card.json, README.md, ledger.jsonl   what is in it and what is not: `ssacl.data.card`
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import dataclass, field
from typing import Any

from ssacl.data.records import SPLITS, Sample
from ssacl.data.storage import MissingObjectError, Storage, count_retry
from ssacl.errors import ConfigError, DataError

INDEX = "index.json"
VERSION = 1
_NUM_READS = 4
_BLOCK = tarfile.BLOCKSIZE
_JSON_FIELDS = tuple(item.name for item in dataclasses.fields(Sample) if item.name not in {"key", "image"})


class OtherVersionError(DataError):
    """The data set is whole, but of a release whose index this one does not read."""


@dataclass(frozen=True)
class SampleEntry:
    """Where a sample lies. Offsets and sizes are bytes in the shard; the picture comes first, its JSON follows."""

    key: str
    shard: str
    split: str
    image_format: str
    image_offset: int
    image_size: int
    json_offset: int
    json_size: int
    crc32: int
    """Of the picture and its JSON: a flipped byte shows when the sample is read, not only in `verify`."""


@dataclass(frozen=True)
class ShardEntry:
    name: str
    split: str
    bytes: int
    sha256: str
    samples: tuple[SampleEntry, ...] = field(repr=False)

    @property
    def count(self) -> int:
        return len(self.samples)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON tree; a sample is a row in the order of `SampleEntry`, less shard and split."""
        rows = [
            [item.key, item.image_format, item.image_offset, item.image_size, item.json_offset, item.json_size, item.crc32]
            for item in self.samples
        ]
        return {"name": self.name, "split": self.split, "count": self.count, "bytes": self.bytes, "sha256": self.sha256, "samples": rows}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> ShardEntry:
        name, split = str(tree["name"]), str(tree["split"])
        samples = tuple(SampleEntry(row[0], name, split, *row[1:]) for row in tree["samples"])
        if tree["count"] != len(samples):
            raise ValueError("count differs from the number of samples")
        return cls(name, split, int(tree["bytes"]), str(tree["sha256"]), samples)


@dataclass(frozen=True)
class ShardIndex:
    """What a data set holds."""

    shards: tuple[ShardEntry, ...]
    fingerprint: str = ""
    """Of the settings and the key that made the set: only what is made with the same may be added."""
    num_parts: dict[str, int] = field(default_factory=dict)
    """Split -> records of shards (`ssacl.data.chunks`) that the set is made of; they never change again."""

    @classmethod
    def load(cls, storage: Storage) -> ShardIndex:
        """Read `index.json`.

        Raises
        ------
        DataError
            There is no data set, or its index is damaged; `OtherVersionError` if it is of another version.
        StorageError
            Storage cannot be reached.
        """
        try:
            tree = json.loads(storage.read(INDEX))
        except MissingObjectError as error:
            raise DataError(
                f"No data set at {storage.url}: it has no {INDEX}. Check the URL, or make one with: ssacl data ingest."
            ) from error
        except ValueError as error:
            raise DataError(f"{storage.url}/{INDEX} is damaged. Run ssacl data ingest again to rebuild it.") from error
        if not isinstance(tree, dict) or tree.get("version") != VERSION:
            raise OtherVersionError(f"{storage.url}/{INDEX} is not of version {VERSION}. Ingest the data again with this release.")
        try:
            # Sets of earlier releases have no checksum of the index and no numbers of parts.
            if tree.get("sha256", _checksum(tree["shards"])) != _checksum(tree["shards"]):
                raise ValueError("sha256 differs")
            shards = tuple(ShardEntry.from_json(shard) for shard in tree["shards"])
            num_parts = {split: int(tree.get("parts", {}).get(split, 0)) for split in SPLITS}
            return cls(shards, str(tree.get("fingerprint", "")), num_parts)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"{storage.url}/{INDEX} is damaged. Run ssacl data ingest again to rebuild it.") from error

    def save(self, storage: Storage) -> None:
        storage.write(INDEX, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of `index.json`."""
        shards = [shard.to_json() for shard in self.shards]
        tree = {"version": VERSION, "fingerprint": self.fingerprint, "parts": self.num_parts, "sha256": _checksum(shards), "shards": shards}
        return json.dumps(tree, separators=(",", ":")).encode()

    def samples(self, split: str) -> list[SampleEntry]:
        """The samples of a split, in shard order.

        Raises
        ------
        ConfigError
            `split` is not one of `SPLITS`.
        """
        if split not in SPLITS:
            raise ConfigError(f"'{split}' is no split; choose one of {', '.join(SPLITS)}.")
        return [sample for shard in self.shards if shard.split == split for sample in shard.samples]

    @property
    def digest(self) -> str:
        """sha256 over names and hashes of all shards: names the content of the set."""
        return hashlib.sha256("".join(f"{shard.name}:{shard.sha256}\n" for shard in self.shards).encode()).hexdigest()


class ShardWriter:
    """Collects the samples of one shard in memory, then puts it into storage whole. The same samples give the same bytes."""

    def __init__(self, storage: Storage, split: str, number: int = 0) -> None:
        self._storage = storage
        self.split, self.name = split, shard_name(split, number)
        self._tar = io.BytesIO()
        self._samples: list[SampleEntry] = []

    def add(self, sample: Sample) -> None:
        """Append a sample's two members."""
        document = encode_document(sample)
        image_offset = self._append(f"{sample.key}.{sample.image_format}", sample.image)
        json_offset = self._append(f"{sample.key}.json", document)
        crc32 = zlib.crc32(document, zlib.crc32(sample.image))
        entry = (sample.key, self.name, self.split, sample.image_format, image_offset, len(sample.image), json_offset, len(document), crc32)
        self._samples.append(SampleEntry(*entry))

    def close(self, expected_sha256: str = "") -> ShardEntry:
        """Write the shard; only now is anything visible. Without samples there is no shard, and its entry has no bytes.

        Parameters
        ----------
        expected_sha256
            Of the shard that is made again; nothing is written where the bytes are others.

        Raises
        ------
        DataError
            The bytes are not those expected.
        StorageError
            Storage refused or is full.
        """
        if not self._samples:
            self._storage.delete(self.name)
            return ShardEntry(self.name, self.split, 0, hashlib.sha256().hexdigest(), ())
        self._tar.write(bytes(2 * _BLOCK))
        content = self._tar.getvalue()
        sha256 = hashlib.sha256(content).hexdigest()
        if expected_sha256 and sha256 != expected_sha256:
            raise DataError(
                f"{self.name} cannot be made again as it was: its source, or the release that reads it, has changed. "
                "Restore it from a copy, or ingest into another URL."
            )
        self._storage.write(self.name, content)
        return ShardEntry(self.name, self.split, len(content), sha256, tuple(self._samples))

    def _append(self, name: str, content: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o444
        self._tar.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._tar.tell()
        self._tar.write(content + bytes(-len(content) % _BLOCK))
        return offset


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def shard_number(name: str) -> int:
    """The number in a shard's name."""
    return int(name.removesuffix(".tar").rpartition("-")[2])


def encode_document(sample: Sample) -> bytes:
    """The JSON member of a sample: every field but key and picture."""
    return json.dumps({name: getattr(sample, name) for name in _JSON_FIELDS}, sort_keys=True, separators=(",", ":")).encode()


def read_sample(storage: Storage, entry: SampleEntry) -> Sample:
    """One sample by one range read; read again where its bytes were damaged on the way.

    Raises
    ------
    DataError
        The bytes are not those that were written.
    StorageError
        Storage cannot be reached, or the shard is gone or cut.
    """
    wrong: set[int] = set()
    for _ in range(_NUM_READS):
        span = storage.read(entry.shard, entry.image_offset, entry.json_offset + entry.json_size)
        image, document = span[: entry.image_size], span[entry.json_offset - entry.image_offset :]
        found = zlib.crc32(document, zlib.crc32(image))
        if found == entry.crc32:
            return decode_sample(entry.key, image, document)
        if found in wrong:
            break  # Twice the same wrong bytes: they lie there like this.
        wrong.add(found)
        count_retry(storage, "wrong_bytes")
    raise DataError(f"Sample {entry.key} in {entry.shard} is damaged. Delete that shard and run ssacl data ingest again.")


def decode_sample(key: str, image: bytes, document: bytes) -> Sample:
    """A sample from its two members; unknown fields of later releases are left out.

    Raises
    ------
    DataError
        The JSON is damaged.
    """
    try:
        tree = {name: value for name, value in json.loads(document).items() if name in _JSON_FIELDS}
        lists = {name: tuple(tree[name]) for name in ("labels", "anatomy_groups") if name in tree}
        return Sample(key=key, image=image, **(tree | lists))
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"The JSON of sample {key} is damaged. Delete its shard and run ssacl data ingest again.") from error


def _checksum(shards: list[Any]) -> str:
    return hashlib.sha256(json.dumps(shards, separators=(",", ":")).encode()).hexdigest()
