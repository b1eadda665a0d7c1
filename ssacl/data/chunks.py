"""Chunks of studies and the shards made of them: the unit of ingest that is done once, anywhere, and not again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.data.convert import IngestSettings, Reject, convert_study
from ssacl.data.records import Sample, Study
from ssacl.data.shards import ShardEntry, ShardWriter, shard_name, shard_number
from ssacl.data.storage import open_storage

PARTS = "_parts"
"""Where the records of finished shards lie."""


@dataclass(frozen=True)
class Chunk:
    """The studies of one shard."""

    split: str
    number: int
    studies: tuple[Study, ...] = field(repr=False)
    marks: dict[str, str] = field(repr=False)
    """Study key -> `study_mark`, in the order of the studies."""
    settings_fingerprint: str
    first: int = 0
    """Number of the first shard that was planned with this one: those before it were committed by then."""
    excluded: tuple[str, ...] = ()
    """Samples that repeat a picture of another shard."""
    again: ShardEntry | None = None
    """A committed shard that was lost, to be made with these samples and bytes or not at all."""

    @property
    def part_key(self) -> str:
        return part_key(shard_name(self.split, self.number))

    @property
    def fingerprint(self) -> str:
        """Equal for chunks that make the same shard, but for what is excluded."""
        marks = (f"{key}:{mark}" for key, mark in self.marks.items())
        return joined_hash([self.settings_fingerprint, self.split, str(self.first), *marks])


@dataclass(frozen=True)
class Part:
    """The record of a finished shard."""

    fingerprint: str
    settings_fingerprint: str
    first: int
    excluded: tuple[str, ...]
    shard: ShardEntry
    marks: dict[str, str]
    """Study key -> `study_mark` when it was ingested."""
    patients: tuple[str, ...]
    """Patient keys of its samples."""
    digests: dict[str, str]
    """Sample key -> digest of its picture, excluded ones too."""
    rejects: tuple[Reject, ...]
    counts: dict[str, dict[str, int]]
    """"view", "licence", ... -> value -> number of samples."""
    statuses: tuple[tuple[int, ...], ...]
    """[14][4] samples of each finding and FindingStatus; those without labels are not in it."""

    @property
    def key(self) -> str:
        return part_key(self.shard.name)

    @property
    def number(self) -> int:
        return shard_number(self.shard.name)

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        tree = {item: getattr(self, item) for item in self.__dataclass_fields__} | {
            "shard": self.shard.to_json(),
            "rejects": [asdict(reject) for reject in self.rejects],
        }
        return json.dumps(tree, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Part:
        """The record that `to_bytes` wrote.

        Raises
        ------
        ValueError
            It is damaged, or of another release.
        """
        try:
            tree: dict[str, Any] = json.loads(content)
            return cls(
                str(tree["fingerprint"]),
                str(tree["settings_fingerprint"]),
                int(tree["first"]),
                tuple(tree["excluded"]),
                ShardEntry.from_json(tree["shard"]),
                dict(tree["marks"]),
                tuple(tree["patients"]),
                dict(tree["digests"]),
                tuple(Reject(**reject) for reject in tree["rejects"]),
                dict(tree["counts"]),
                tuple(tuple(row) for row in tree["statuses"]),
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError("damaged record of a shard") from error


@dataclass(frozen=True)
class Made:
    """What `run_chunk` did."""

    part: Part
    retries: dict[str, int]
    """Storage calls that were tried again, by reason."""


def run_chunk(chunk: Chunk, data_url: str, settings: IngestSettings) -> Made:
    """Make one shard and its record; the same chunk gives the same bytes, so doing it twice does no harm.

    Raises
    ------
    DataError
        A committed shard cannot be made again as it was.
    StorageError
        Storage refused, is full or cannot be reached.
    """
    storage = open_storage(data_url)
    writer = ShardWriter(storage, chunk.split, chunk.number)
    wanted = None if chunk.again is None else {entry.key for entry in chunk.again.samples}
    digests: dict[str, str] = {}
    patients: dict[str, None] = {}
    rejects: list[Reject] = []
    excluded: list[str] = []
    counts: dict[str, Counter[str]] = {}
    statuses = [[0] * len(FindingStatus) for _ in FINDINGS]
    seen: set[str] = set()
    for study in chunk.studies:
        samples, refused = convert_study(study, settings)
        rejects += refused
        for sample in samples:
            digest = digests[sample.key] = str(sample.provenance["content_sha256"])
            if digest in seen or sample.key in chunk.excluded or (wanted is not None and sample.key not in wanted):
                study_key, _, number = sample.key.partition("-")
                excluded.append(sample.key)
                rejects.append(Reject(study_key, "duplicate", int(number)))
                continue
            seen.add(digest)
            writer.add(sample)
            patients[sample.patient_key] = None
            _count(counts, statuses, sample)
    part = Part(
        fingerprint=chunk.fingerprint,
        settings_fingerprint=chunk.settings_fingerprint,
        first=chunk.first,
        excluded=tuple(excluded),
        shard=writer.close("" if chunk.again is None else chunk.again.sha256),
        marks=chunk.marks,
        patients=tuple(patients),
        digests=digests,
        rejects=tuple(rejects),
        counts={kind: dict(count) for kind, count in counts.items()},
        statuses=tuple(tuple(row) for row in statuses),
    )
    storage.write(part.key, part.to_bytes())
    return Made(part, dict(storage.retries))


def _count(counts: dict[str, Counter[str]], statuses: list[list[int]], sample: Sample) -> None:
    for row, status in zip(statuses, sample.labels, strict=False):
        row[status] += 1
    text = "findings and impression" if sample.findings and sample.impression else "one section" if sample.has_text else "none"
    values = {
        "view": sample.view or "unknown",
        "report": text,
        "labels": "labelled" if sample.labels else "none",
        "source": str(sample.provenance["source"]),
        "licence": str(sample.provenance["licence"] or "not stated"),
        "polarity": "corrected" if sample.provenance["polarity_corrected"] else "as declared",
        "release": str(sample.provenance["ssacl_version"]),
    }
    for kind, value in values.items():
        counts.setdefault(kind, Counter())[value] += 1


def part_key(name: str) -> str:
    """Where the record of a shard lies."""
    return f"{PARTS}/{name.removesuffix('.tar')}.json"


def joined_hash(values: Iterable[str]) -> str:
    """sha256 over a sequence of strings."""
    return hashlib.sha256("\n".join(values).encode()).hexdigest()


def study_mark(study: Study, split: str) -> str:
    """Changes when a study's content does (patient, split, report, labels, licence, number, views and sizes of its files).

    Where its files lie does not matter, and files are not read for it: pixels that change under the same size go unseen.
    """
    sizes = [len(image.content) if image.content is not None else _size(image.path) for image in study.images]
    views = [image.view for image in study.images]
    values = [study.patient_id, split, study.report, study.licence, sorted(study.labels.items()), sizes, views]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path else -1
    except OSError:
        return -1
