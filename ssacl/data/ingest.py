"""Studies -> de-identified shards, an index, a card and a ledger. Runs in this process; `ray_jobs/ingest.py` runs it in parallel.

A data set is cut into chunks of studies of one split; a chunk becomes one shard and one record of it (`ssacl.data.chunks`). What is done is
skipped by a second run (`ssacl.data.plan`); the index, which makes new shards visible, is written last.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssacl.data.card import CARD, LEDGER, README, ledger, left_out, make_card, readable
from ssacl.data.chunks import PARTS, Chunk, Made, Part, run_chunk
from ssacl.data.convert import IngestSettings, Reject, study_to_samples
from ssacl.data.lease import Lease, hold_lease
from ssacl.data.plan import Plan, Standing, load_standing, plan_chunks
from ssacl.data.records import SPLITS
from ssacl.data.shards import INDEX, ShardIndex
from ssacl.data.sources import SourceOptions, open_source
from ssacl.data.storage import MissingObjectError, Storage, open_storage
from ssacl.errors import DataError, StorageError
from ssacl.progress import ProgressBar

__all__ = ["IngestSettings", "IngestSummary", "Reject", "ingest", "run_chunk", "run_local", "study_to_samples"]

logger = logging.getLogger(__name__)

Runner = Callable[[Sequence[Chunk]], Iterable[Made]]
_SHARD = re.compile(rf"(?:{'|'.join(SPLITS)})-\d+\.tar")


@dataclass(frozen=True)
class IngestSummary:
    """What a run of ingest left behind."""

    url: str
    num_studies: int
    """In the source."""
    num_samples: dict[str, int]
    """In the data set, per split."""
    rejects: dict[str, int]
    """Images and studies left out, by reason, and studies that differ from the source ("changed", "gone")."""
    num_shards: int
    num_shards_written: int
    """0: the data set was complete before."""
    seconds: float
    retries: dict[str, int]
    """Storage calls that were tried again, by reason."""

    def describe(self) -> str:
        """A few lines for people."""
        splits = ", ".join(f"{name} {count}" for name, count in self.num_samples.items())
        total = sum(self.num_samples.values())
        lines = [f"{self.url}: {total} samples ({splits}) in {self.num_shards} shards from {self.num_studies} studies"]
        if self.num_shards_written:
            lines.append(f"{self.num_shards_written} shards written in {self.seconds:.1f} s")
        else:
            lines.append("nothing to do: the data set was complete")
        if self.rejects:
            lines.append(f"left out: {_listed(self.rejects)} (each is listed in {LEDGER})")
        if self.retries:
            lines.append(f"storage calls tried again: {_listed(self.retries)}")
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

    def run(chunks: Sequence[Chunk]) -> Iterator[Made]:
        for chunk in chunks:
            yield run_chunk(chunk, data_url, settings)

    return ingest(format, source_path, data_url, settings, options, run, progress)


def ingest(
    format: str,
    source_path: str | Path,
    data_url: str,
    settings: IngestSettings,
    options: SourceOptions | None,
    run: Runner,
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
        Storage refused, is full or cannot be reached, or another ingest writes there; finished shards stay and are not made again.
    """
    started = time.monotonic()
    storage = open_storage(data_url)
    studies = open_source(format, source_path, options)
    # A source that cannot be read leaves no trace at the URL.
    first = list(itertools.islice(studies, 1))
    if not first:
        raise DataError("The source holds no study. Check the path and the format.")
    with hold_lease(storage) as lease:
        standing = load_standing(storage, settings)
        plan = plan_chunks(itertools.chain(first, studies), settings, standing)
        work = _Work(plan, standing, run)
        with ProgressBar("ingest", plan.num_new_studies, "studies") if progress else nullcontext() as bar:
            work.do(bar)
        parts = work.parts()
        rejects = left_out(parts, plan.notes)
        counts = dict(sorted(Counter(reject.reason for reject in rejects).items()))
        index = ShardIndex(tuple(part.shard for part in parts if part.shard.count), settings.fingerprint, _num_parts(parts))
        if not index.shards:
            storage.write(LEDGER, ledger(rejects))
            raise DataError(
                f"Not one usable picture in {plan.num_studies} studies ({_listed(counts)}). See {storage.url}/{LEDGER}; "
                "no data set was made."
            )
        card = make_card(parts, rejects, settings, plan.num_studies)
        _commit(storage, lease, index, parts, card, rejects)
    retries = dict(work.retries + storage.retries)
    seconds = time.monotonic() - started
    return IngestSummary(str(data_url), plan.num_studies, card["samples"], counts, len(index.shards), len(work.written), seconds, retries)


class _Work:
    """Has the chunks of a plan made, and keeps their records."""

    def __init__(self, plan: Plan, standing: Standing, run: Runner) -> None:
        self._plan, self._run = plan, run
        self._committed = dict(standing.committed)
        done = standing.finished
        self._new = {chunk.part_key: done[chunk.part_key] for chunk in plan.new if _is_of(done.get(chunk.part_key), chunk)}
        self.written: set[str] = set()
        """Records of shards made; one that is made twice counts once."""
        self.retries: Counter[str] = Counter()

    def do(self, bar: ProgressBar | None) -> None:
        """Make what is missing, then the shards that repeat pictures of earlier ones again without them: few or none."""
        todo = [chunk for chunk in self._plan.new if chunk.part_key not in self._new]
        if bar is not None:
            bar.start_at(self._plan.num_new_studies - sum(len(chunk.studies) for chunk in todo))
        self._make([*self._plan.again, *todo], bar)
        self._make([chunk for chunk in self._without_duplicates() if self._new[chunk.part_key].excluded != chunk.excluded], None)

    def parts(self) -> list[Part]:
        """All records of the data set: by split and number."""
        return sorted([*self._committed.values(), *self._new.values()], key=lambda part: (SPLITS.index(part.shard.split), part.number))

    def _make(self, chunks: list[Chunk], bar: ProgressBar | None) -> None:
        again = {chunk.part_key for chunk in chunks if chunk.again is not None}
        num_left_out = sum(len(part.rejects) for part in self._new.values())
        for made in self._run(chunks) if chunks else ():
            part = made.part
            (self._committed if part.key in again else self._new)[part.key] = part
            self.written.add(part.key)
            self.retries.update(made.retries)
            if bar is not None and part.key not in again:
                num_left_out += len(part.rejects)
                bar.advance(len(part.marks), note=f"{num_left_out} left out")

    def _without_duplicates(self) -> Iterator[Chunk]:
        """The new chunks less samples whose picture stands in a committed, the same or an earlier shard: train before val before test."""
        seen = {digest for part in self._committed.values() for digest in part.digests.values()}
        for chunk in self._plan.new:
            repeated = []
            for key, digest in self._new[chunk.part_key].digests.items():
                if digest in seen:
                    repeated.append(key)
                seen.add(digest)
            yield replace(chunk, excluded=tuple(repeated))


def _is_of(part: Part | None, chunk: Chunk) -> bool:
    return part is not None and part.fingerprint == chunk.fingerprint


def _num_parts(parts: Sequence[Part]) -> dict[str, int]:
    return {split: max((part.number + 1 for part in parts if part.shard.split == split), default=0) for split in SPLITS}


def _commit(
    storage: Storage, lease: Lease, index: ShardIndex, parts: Sequence[Part], card: dict[str, Any], rejects: Iterable[Reject]
) -> None:
    """Write what has changed, the index last, and remove what interrupted runs with other studies or settings left."""
    stored = {item.key: item.size for item in storage.list()}
    for shard in index.shards:
        if stored.get(shard.name) != shard.bytes:
            raise StorageError(f"{storage.url}/{shard.name} was changed while this ingest ran. Run it again to mend it.")
    lease.check()
    documents = {
        LEDGER: ledger(rejects),
        README: readable(card).encode(),
        CARD: json.dumps(card, indent=1).encode(),
        INDEX: index.to_bytes(),
    }
    for key, content in documents.items():
        if _stored(storage, key) != content:
            storage.write(key, content)
    listed = {shard.name for shard in index.shards} | {part.key for part in parts}
    for key in stored.keys() - listed:
        if _SHARD.fullmatch(key) or key.startswith(f"{PARTS}/"):
            storage.delete(key)
    storage.sweep(lambda key: key in listed or key in documents or key.startswith(f"{PARTS}/"))
    logger.info("data set committed: %d shards, %d samples", len(index.shards), sum(card["samples"].values()))


def _stored(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.read(key)
    except MissingObjectError:
        return None


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
