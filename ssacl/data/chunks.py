"""Chunks of studies and the shards made of them: the unit of ingest that is done once, anywhere, and not again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.data.convert import IngestSettings, Reject, convert_study, split_of
from ssacl.data.deidentify import keyed_hash
from ssacl.data.records import SPLITS, Sample, Study
from ssacl.data.shards import ShardEntry, ShardWriter
from ssacl.data.storage import open_storage
from ssacl.errors import DataError

PARTS = "_parts"
"""Where the records of finished shards lie."""


@dataclass(frozen=True)
class Chunk:
    """The studies of one shard. `excluded` samples repeat a picture of an earlier shard."""

    split: str
    number: int
    studies: tuple[Study, ...] = field(repr=False)
    fingerprint: str
    excluded: tuple[str, ...] = ()

    @property
    def part_key(self) -> str:
        return f"{PARTS}/{self.split}-{self.number:06d}.json"


@dataclass(frozen=True)
class Part:
    """The record of a finished shard."""

    fingerprint: str
    excluded: tuple[str, ...]
    shard: ShardEntry
    digests: dict[str, str]
    """Sample key -> digest of its picture, excluded ones too."""
    rejects: tuple[Reject, ...]
    counts: dict[str, dict[str, int]]
    """"view", "finding", "licence", ... -> value -> number of samples."""

    @property
    def key(self) -> str:
        return f"{PARTS}/{self.shard.name.removesuffix('.tar')}.json"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON tree."""
        return {
            "fingerprint": self.fingerprint,
            "excluded": list(self.excluded),
            "shard": self.shard.to_json(),
            "digests": self.digests,
            "rejects": [asdict(reject) for reject in self.rejects],
            "counts": self.counts,
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Part:
        return cls(
            tree["fingerprint"],
            tuple(tree["excluded"]),
            ShardEntry.from_json(tree["shard"]),
            tree["digests"],
            tuple(Reject(**reject) for reject in tree["rejects"]),
            tree["counts"],
        )


def plan_chunks(studies: Iterable[Study], settings: IngestSettings) -> list[Chunk]:
    """Cut a source into chunks: by split, in the order of the study keys, which says nothing about the source.

    Raises
    ------
    DataError
        No study.
    """
    by_split: dict[str, list[tuple[str, Study]]] = {split: [] for split in SPLITS}
    for study in studies:
        split = study.split or split_of(study.patient_id, settings)
        by_split[split].append((keyed_hash(settings.key_secret, "study", study.study_id), study))
    if not any(by_split.values()):
        raise DataError("The source holds no study. Check the path and the format.")
    chunks = []
    for split, group in by_split.items():
        group.sort(key=lambda item: item[0])
        for number, start in enumerate(range(0, len(group), settings.shard_size)):
            members = group[start : start + settings.shard_size]
            marks = (f"{key}:{_study_mark(study)}" for key, study in members)
            fingerprint = joined_hash([settings.fingerprint, split, *marks])
            chunks.append(Chunk(split, number, tuple(study for _, study in members), fingerprint))
    return chunks


def run_chunk(chunk: Chunk, data_url: str, settings: IngestSettings) -> Part:
    """Make one shard and its record; the same chunk gives the same bytes, so doing it twice does no harm.

    Raises
    ------
    StorageError
        Storage refused, is full or cannot be reached.
    """
    storage = open_storage(data_url)
    writer = ShardWriter(storage, chunk.split, chunk.number)
    digests: dict[str, str] = {}
    rejects: list[Reject] = []
    excluded: list[str] = []
    counts: dict[str, Counter[str]] = {}
    seen: set[str] = set()
    for study in chunk.studies:
        samples, refused = convert_study(study, settings)
        rejects += refused
        for sample in samples:
            digest = digests[sample.key] = str(sample.provenance["content_sha256"])
            if digest in seen or sample.key in chunk.excluded:
                study_key, _, number = sample.key.partition("-")
                excluded.append(sample.key)
                rejects.append(Reject(study_key, "duplicate", int(number)))
                continue
            seen.add(digest)
            writer.add(sample)
            _count(counts, sample)
    shard = writer.close()
    part = Part(chunk.fingerprint, tuple(excluded), shard, digests, tuple(rejects), {kind: dict(count) for kind, count in counts.items()})
    storage.write(part.key, json.dumps(part.to_json(), separators=(",", ":")).encode())
    return part


def _count(counts: dict[str, Counter[str]], sample: Sample) -> None:
    present = [name for name, status in zip(FINDINGS, sample.labels, strict=False) if status == FindingStatus.PRESENT]
    text = "findings and impression" if sample.findings and sample.impression else "one section" if sample.has_text else "none"
    values = {
        "view": [sample.view or "unknown"],
        "finding": present,
        "licence": [str(sample.provenance["licence"] or "not stated")],
        "source": [str(sample.provenance["source"])],
        "report": [text],
        "polarity": ["corrected"] if sample.provenance["polarity_corrected"] else [],
        "burned_in_text": [str(sample.provenance["burned_in"])] if sample.provenance["burned_in"] else [],
    }
    for kind, items in values.items():
        counts.setdefault(kind, Counter()).update(items)


def joined_hash(values: Iterable[str]) -> str:
    """sha256 over a sequence of strings."""
    return hashlib.sha256("\n".join(values).encode()).hexdigest()


def _study_mark(study: Study) -> str:
    """Changes when a study's content does; where its files lie does not matter."""
    sizes = [image.size for image in study.images]
    views = [image.view for image in study.images]
    values = [study.patient_id, study.report, study.licence, sorted(study.labels.items()), sizes, views]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
