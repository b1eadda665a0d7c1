"""Studies -> de-identified shards, an index, a card and a ledger. Runs in this process; `ray_jobs/ingest.py` runs it in parallel.

A data set is cut into chunks of studies of one split; a chunk becomes one shard and one record of it (`ssacl.data.chunks`). What is done is
skipped by a second run; the index, which makes the data set visible, is written last.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ssacl import __version__
from ssacl.data.chunks import PARTS, Chunk, Part, joined_hash, plan_chunks, run_chunk
from ssacl.data.convert import IngestSettings, Reject, study_to_samples
from ssacl.data.records import SPLITS
from ssacl.data.shards import CARD, INDEX, LEDGER, ShardIndex
from ssacl.data.sources import SourceOptions, open_source
from ssacl.data.storage import Storage, open_storage
from ssacl.errors import DataError
from ssacl.progress import ProgressBar

__all__ = ["IngestSettings", "IngestSummary", "Reject", "ingest", "plan_chunks", "run_chunk", "run_local", "study_to_samples"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestSummary:
    """What a run of ingest left behind."""

    url: str
    num_studies: int
    num_samples: dict[str, int]
    """Per split."""
    rejects: dict[str, int]
    """Images and studies left out, by reason."""
    num_shards: int
    num_shards_written: int
    """0: the data set was complete before."""
    seconds: float

    def describe(self) -> str:
        """A few lines for people."""
        splits = ", ".join(f"{name} {count}" for name, count in self.num_samples.items())
        lines = [
            f"{self.url}: {sum(self.num_samples.values())} samples ({splits}) in {self.num_shards} shards from {self.num_studies} studies"
        ]
        if self.num_shards_written:
            lines.append(f"{self.num_shards_written} shards written in {self.seconds:.1f} s")
        else:
            lines.append("nothing to do: the data set was complete")
        if self.rejects:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.rejects.items())
            lines.append(f"left out: {reasons} (each is listed in {LEDGER})")
        return "\n".join(lines)


def run_local(
    format: str,
    source_path: str | Path,
    data_url: str,
    settings: IngestSettings,
    options: SourceOptions | None = None,
    progress: bool = False,
) -> IngestSummary:
    """Ingest in this process, without Ray. See `ingest` for what it does and raises."""

    def run(chunks: Sequence[Chunk]) -> Iterator[Part]:
        for chunk in chunks:
            yield run_chunk(chunk, data_url, settings)

    return ingest(format, source_path, data_url, settings, options, run, progress)


def ingest(
    format: str,
    source_path: str | Path,
    data_url: str,
    settings: IngestSettings,
    options: SourceOptions | None,
    run: Callable[[Sequence[Chunk]], Iterable[Part]],
    progress: bool,
) -> IngestSummary:
    """Plan the chunks, have `run` make those that are missing (in any order), and commit the index.

    Raises
    ------
    DataError
        The source is empty, gives not one usable picture, or the URL holds another data set.
    ConfigError
        Unknown format or column role.
    StorageError
        Storage refused, is full or cannot be reached; finished shards stay and are not made again.
    """
    started = time.monotonic()
    storage = open_storage(data_url)
    chunks = plan_chunks(open_source(format, source_path, options), settings)
    fingerprint = joined_hash(chunk.fingerprint for chunk in chunks)
    _refuse_other(storage, fingerprint)
    num_studies = sum(len(chunk.studies) for chunk in chunks)
    parts = _finished_parts(storage, chunks)
    num_written = 0

    def make(todo: list[Chunk]) -> None:
        nonlocal num_written
        new = {chunk.part_key: len(chunk.studies) for chunk in todo if chunk.part_key not in parts}
        for part in run(todo) if todo else ():
            parts[part.key] = part
            num_written += 1
            bar.advance(new.get(part.key, 0), note=f"{sum(len(item.rejects) for item in parts.values())} left out")

    with ProgressBar("ingest", num_studies, "studies") if progress else _Silent() as bar:
        bar.advance(sum(len(chunk.studies) for chunk in chunks if chunk.part_key in parts))
        make([chunk for chunk in chunks if chunk.part_key not in parts])
        # Shards that repeat pictures of earlier ones are made again without them: few or none.
        make([chunk for chunk in _without_duplicates(chunks, parts) if parts[chunk.part_key].excluded != chunk.excluded])
    finished = [parts[chunk.part_key] for chunk in chunks]
    num_samples = {split: sum(part.shard.count for part in finished if part.shard.split == split) for split in SPLITS}
    rejects = dict(sorted(Counter(reject.reason for part in finished for reject in part.rejects).items()))
    if num_written or not storage.exists(INDEX):
        _commit(storage, fingerprint, finished, settings, num_studies, num_samples, rejects)
    num_shards = sum(part.shard.count > 0 for part in finished)
    return IngestSummary(str(data_url), num_studies, num_samples, rejects, num_shards, num_written, time.monotonic() - started)


def _finished_parts(storage: Storage, chunks: Sequence[Chunk]) -> dict[str, Part]:
    """The records of shards that are there, whole by size, and made from the same studies and settings."""
    sizes = {item.key: item.size for item in storage.list()}
    parts = {}
    for chunk in chunks:
        if chunk.part_key not in sizes:
            continue
        try:
            part = Part.from_json(json.loads(storage.read(chunk.part_key)))
        except (ValueError, KeyError, TypeError, IndexError):
            continue  # A damaged record is made again.
        if part.fingerprint == chunk.fingerprint and (part.shard.count == 0 or sizes.get(part.shard.name) == part.shard.bytes):
            parts[chunk.part_key] = part
    return parts


def _without_duplicates(chunks: Sequence[Chunk], parts: dict[str, Part]) -> list[Chunk]:
    """The chunks with the samples excluded whose picture stands in the same or an earlier chunk: train before val before test."""
    seen: set[str] = set()
    plan = []
    for chunk in chunks:
        repeated = []
        for key, digest in parts[chunk.part_key].digests.items():
            if digest in seen:
                repeated.append(key)
            seen.add(digest)
        plan.append(replace(chunk, excluded=tuple(repeated)))
    return plan


def _refuse_other(storage: Storage, fingerprint: str) -> None:
    try:
        there = ShardIndex.load(storage).fingerprint
    except DataError:
        return  # None yet, or a damaged index: this run writes it.
    if there != fingerprint:
        raise DataError(
            f"{storage.url} holds a data set made from other studies, with other settings or another key. "
            "Choose another URL, or delete that data set first."
        )


def _commit(
    storage: Storage,
    fingerprint: str,
    finished: Sequence[Part],
    settings: IngestSettings,
    num_studies: int,
    num_samples: dict[str, int],
    rejects: dict[str, int],
) -> None:
    lines = (json.dumps(asdict(reject)) + "\n" for part in finished for reject in part.rejects)
    storage.write(LEDGER, "".join(lines).encode())
    if not any(num_samples.values()):
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejects.items())
        raise DataError(f"Not one usable picture in {num_studies} studies ({reasons}). See {storage.url}/{LEDGER}; no data set was made.")
    counts: dict[str, Counter[str]] = {}
    for part in finished:
        for kind, values in part.counts.items():
            counts.setdefault(kind, Counter()).update(values)
    made_with = {name: value for name, value in asdict(settings).items() if name != "key_secret"}
    card = {
        "samples": num_samples,
        "studies": num_studies,
        **{kind: dict(count.most_common()) for kind, count in counts.items()},
        "left_out": rejects,
        "settings": made_with,
        "ssacl_version": __version__,
    }
    storage.write(CARD, json.dumps(card, indent=1).encode())
    index = ShardIndex(tuple(part.shard for part in finished if part.shard.count), fingerprint)
    index.save(storage)
    listed = {shard.name for shard in index.shards} | {part.key for part in finished}
    for item in storage.list():
        # Left by an interrupted run with other settings.
        is_shard = item.key.endswith(".tar") and "/" not in item.key
        if (is_shard or item.key.startswith(f"{PARTS}/")) and item.key not in listed:
            storage.delete(item.key)
    logger.info("data set committed: %d shards, %d samples", len(index.shards), sum(num_samples.values()))


class _Silent:
    """Stands in for the bar where no progress is wanted."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def advance(self, count: int = 1, note: str | None = None) -> None:
        return None
