"""What ingest has to do: what stands in storage, against what the source holds now.

A committed shard (one that the index lists) never changes: runs are trained on it. A study that is not in the data set goes to a new shard;
so does one that gave no sample and has changed since. A study that gave samples and has changed, or is gone from the source, stays as it
was ingested, and is named. Shards of a run that did not end are kept if the same studies would make them now.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ssacl.data.chunks import PARTS, Chunk, Part, part_key, study_mark
from ssacl.data.convert import IngestSettings, Reject, split_of
from ssacl.data.deidentify import keyed_hash
from ssacl.data.records import SPLITS, Study
from ssacl.data.shards import INDEX, OtherVersionError, ShardEntry, ShardIndex, shard_name, shard_number
from ssacl.data.storage import Storage
from ssacl.errors import DataError

logger = logging.getLogger(__name__)
_NUM_READERS = 8


@dataclass(frozen=True)
class Standing:
    """What of a data set lies in storage. Keys are those of the records, `Part.key`."""

    committed: dict[str, Part] = field(default_factory=dict)
    lost: dict[str, ShardEntry] = field(default_factory=dict)
    """Committed shards whose file or record is missing, cut or damaged."""
    records: dict[str, Part] = field(default_factory=dict)
    """Records of lost shards, where they are left."""
    finished: dict[str, Part] = field(default_factory=dict)
    """Made by a run that did not end."""
    num_parts: dict[str, int] = field(default_factory=dict)
    """Split -> number of committed records."""


@dataclass(frozen=True)
class Plan:
    """What a run has to make, and what it found of the source."""

    again: list[Chunk]
    """Committed shards that were lost."""
    new: list[Chunk]
    num_studies: int
    """In the source now."""
    num_new_studies: int
    notes: tuple[Reject, ...]
    """Studies whose state in the data set is not that of the source: "changed", "gone", "repeated"."""


@dataclass(frozen=True)
class _Place:
    part_key: str
    mark: str
    """Empty where the record is lost."""
    has_samples: bool


def load_standing(storage: Storage, settings: IngestSettings) -> Standing:
    """Read what is there.

    Raises
    ------
    DataError
        The data set was made with other settings, another key, or by another release.
    StorageError
        Storage cannot be reached.
    """
    sizes = {item.key: item.size for item in storage.list()}
    index = _index(storage) if INDEX in sizes else None
    if index is not None and index.fingerprint != settings.fingerprint:
        how = "with other settings or another key" if any(index.num_parts.values()) else "by an earlier release, which cannot be added to"
        raise DataError(f"{storage.url} holds a data set made {how}. Choose another URL, or delete that data set first.")
    keys = [key for key in sizes if key.startswith(f"{PARTS}/")]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        read = pool.map(lambda key: _part(storage, key), keys)
        records = {part.key: part for part in read if part and part.settings_fingerprint == settings.fingerprint}
    whole = {key: part for key, part in records.items() if part.shard.count == 0 or sizes.get(part.shard.name) == part.shard.bytes}
    if index is None:
        # Without it, the shards before the youngest plan are known to have been committed.
        num_parts = {split: max((part.first for part in records.values() if part.shard.split == split), default=0) for split in SPLITS}
        listed = {part.key: part.shard for part in records.values()}
    else:
        num_parts = index.num_parts
        listed = {part_key(shard.name): shard for shard in index.shards}
    standing = Standing(num_parts=num_parts, finished=whole)
    for split, count in num_parts.items():
        for key in (part_key(shard_name(split, number)) for number in range(count)):
            part, entry = standing.finished.pop(key, None), listed.get(key)
            if part is not None and (entry == part.shard or (entry is None and part.shard.count == 0)):
                standing.committed[key] = part
            elif entry is not None:
                standing.lost[key] = entry
                if key in records and records[key].shard == entry:
                    standing.records[key] = records[key]
    return standing


def plan_chunks(studies: Iterable[Study], settings: IngestSettings, standing: Standing) -> Plan:
    """Compare the source with what stands. New studies are cut by split, in the order of their keys, which says nothing of the source.

    Raises
    ------
    DataError
        The source has not one of the studies that the data set holds, or not all of those of a lost shard.
    """
    known = _places(standing)
    seen: set[str] = set()
    notes: list[Reject] = []
    fresh: dict[str, list[tuple[str, str, Study]]] = {split: [] for split in SPLITS}
    again: dict[str, dict[str, tuple[str, Study]]] = {key: {} for key in standing.lost}
    for study in studies:
        key = keyed_hash(settings.key_secret, "study", study.study_id)
        if key in seen:
            notes.append(Reject(key, "repeated"))
            continue
        seen.add(key)
        split = study.split or split_of(study.patient_id, settings)
        mark, place = study_mark(study, split), known.get(key)
        if place is None or (not place.has_samples and mark != place.mark):
            fresh[split].append((key, mark, study))
        elif place.mark not in ("", mark):
            notes.append(Reject(key, "changed"))
        elif place.part_key in again:
            again[place.part_key][key] = (mark, study)
    if known and not seen & known.keys():
        raise DataError(
            f"The data set holds {len(known)} studies, and not one of them is in this source: it was made from another. "
            "Choose another URL, or delete that data set first."
        )
    notes += [Reject(key, "gone") for key, place in known.items() if place.has_samples and key not in seen]
    new = [chunk for split, group in fresh.items() for chunk in _cut(split, group, settings, standing.num_parts.get(split, 0))]
    lost = [_chunk_again(key, standing, again[key], settings) for key in standing.lost]
    notes.sort(key=lambda note: (note.reason, note.study_key))
    return Plan(lost, new, len(seen), sum(len(group) for group in fresh.values()), tuple(notes))


def last_places(parts: Iterable[Part]) -> dict[str, str]:
    """Study key -> the part that speaks for it: the one with its samples, else the last that tried."""
    places: dict[str, tuple[str, bool]] = {}
    for part in parts:
        sampled = _sampled(part.shard)
        for key in part.marks:
            if key in sampled or key not in places or not places[key][1]:
                places[key] = (part.key, key in sampled)
    return {key: part_key for key, (part_key, _) in places.items()}


def _places(standing: Standing) -> dict[str, _Place]:
    speaks = last_places([*standing.committed.values(), *standing.records.values()])
    known = {}
    for part in [*standing.committed.values(), *standing.records.values()]:
        sampled = _sampled(part.shard)
        known.update({key: _Place(part.key, mark, key in sampled) for key, mark in part.marks.items() if speaks[key] == part.key})
    for lost, entry in standing.lost.items():
        if lost not in standing.records:
            known.update({key: _Place(lost, "", True) for key in _sampled(entry)})
    return known


def _sampled(shard: ShardEntry) -> dict[str, None]:
    """Keys of the studies that have samples in a shard, in their order."""
    return dict.fromkeys(entry.key.partition("-")[0] for entry in shard.samples)


def _cut(split: str, group: list[tuple[str, str, Study]], settings: IngestSettings, first: int) -> Iterator[Chunk]:
    group.sort(key=lambda item: item[0])
    for number, start in enumerate(range(0, len(group), settings.shard_size), first):
        members = group[start : start + settings.shard_size]
        marks = {key: mark for key, mark, _ in members}
        yield Chunk(split, number, tuple(study for *_, study in members), marks, settings.fingerprint, first)


def _chunk_again(key: str, standing: Standing, found: dict[str, tuple[str, Study]], settings: IngestSettings) -> Chunk:
    entry, record = standing.lost[key], standing.records.get(key)
    wanted = list(record.marks) if record else list(_sampled(entry))
    missing = len(wanted) - len(found)
    if missing:
        raise DataError(
            f"{entry.name} is missing or damaged, and {missing} of its {len(wanted)} studies have changed or are gone from the source. "
            "Restore the shard from a copy, or delete the data set and ingest it anew."
        )
    marks = {study: found[study][0] for study in wanted}
    studies = tuple(found[study][1] for study in wanted)
    first, excluded = (record.first, record.excluded) if record else (0, ())
    return Chunk(entry.split, shard_number(entry.name), studies, marks, settings.fingerprint, first, excluded, again=entry)


def _index(storage: Storage) -> ShardIndex | None:
    try:
        return ShardIndex.load(storage)
    except OtherVersionError:
        raise
    except DataError:
        logger.warning("the index of %s is damaged; it is made anew from the records of the shards", storage.url)
        return None


def _part(storage: Storage, key: str) -> Part | None:
    try:
        return Part.from_bytes(storage.read(key))
    except ValueError:
        return None  # Made again.
