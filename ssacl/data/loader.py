"""Streaming loader: every sample once per epoch over all ranks, in an order that is a pure function of (seed, epoch).

The order of an epoch is a permutation computed position by position (nothing is held but the index). Global micro batch g takes
positions [g * W * b, (g + 1) * W * b) and rank r its contiguous slice of it, so that what is trained on together does not depend on W
as long as W * b does not. The state is the epoch and the number of samples consumed over all ranks: any other (W, b) goes on from there,
nothing repeated, nothing skipped.

The last partial batch of an epoch: "drop" leaves it out (other samples in each epoch), "wrap" fills it from the epoch's first positions.

A damaged sample is counted by reason and replaced by the next sound one of the same rank's batch, so that every rank makes equally many
steps; past `max_bad_samples` on a rank the run stops.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from ssacl.data.collate import Collator, Row
from ssacl.data.records import SPLITS, Batch, Sample
from ssacl.data.shards import SampleEntry, ShardIndex, read_sample
from ssacl.data.storage import Storage
from ssacl.data.truth_guard import refuse_truth
from ssacl.errors import CheckpointError, ConfigError, DataError, SplitError

logger = logging.getLogger(__name__)

Purpose = Literal["training", "validation", "evaluation", "prediction"]
_ROUNDS = 6


class EpochOrder:
    """A permutation of range(n), fixed by (seed, epoch), in O(1) memory: `order[position]` is a sample's number.

    A Feistel network over the next power of four, with cycle walking (an output outside of range(n) is permuted again).
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = n
        self._half = max(1, ((max(n, 2) - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        digest = hashlib.blake2b(f"{seed}|{epoch}|order".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * index : 8 * index + 8], "little") for index in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.n:
            raise IndexError(position)
        value = self._permute(position)
        while value >= self.n:
            value = self._permute(value)
        return value

    def _permute(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            # splitmix64's finaliser: every input bit reaches every output bit.
            mixed = (right + key) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 31)) & self._mask)
        return (left << self._half) | right


@dataclass(frozen=True)
class _Plan:
    """One micro batch of this rank, before anything is read."""

    epoch: int
    numbers: tuple[int, ...]
    consumed: int
    """Samples of the epoch that are consumed over all ranks once this batch is trained on."""


def open_split(storage: Storage, split: str, purpose: Purpose) -> list[SampleEntry]:
    """The samples of a split, if `purpose` may read it.

    Raises
    ------
    SplitError
        Training or validation asks for the test split, `split` is no split, or the storage is a phantom's truth.
    DataError
        There is no data set, or the split is empty.
    StorageError
        Storage cannot be reached.
    """
    refuse_truth(storage.url)
    if split not in SPLITS:
        raise SplitError(f"'{split}' is no split of a data set; choose one of {', '.join(SPLITS)}.")
    if split == "test" and purpose not in ("evaluation", "prediction"):
        raise SplitError(f"{purpose.capitalize()} must not read the test split; train on 'train' and choose checkpoints on 'val'.")
    entries = ShardIndex.load(storage).samples(split)
    if not entries:
        raise DataError(f"The split '{split}' of {storage.url} is empty; ingest more patients, or give splits of your own with the source.")
    return entries


class StreamingLoader:
    """Batches of one rank, epoch after epoch without end.

    Parameters
    ----------
    micro_batch_size
        Samples per rank and batch.
    last_batch
        "drop" or "wrap"; see the module.
    num_threads
        Threads that read and decode ahead; 0 does it in the caller's thread.
    prefetch
        Batches in flight, at most; the bound on memory and the back-pressure.
    purpose
        None: "training" for a training collator, else "validation". Evaluation must say so.
    cache_mb
        Encoded samples kept in memory, up to this size, so that later epochs need not read them again.

    Raises
    ------
    SplitError, DataError, StorageError
        See `open_split`; also DataError when "drop" would leave no batch at all.
    ConfigError
        Rank, world size or batch size make no sense.
    """

    def __init__(
        self,
        storage: Storage,
        split: str,
        collator: Collator,
        world_rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int = 1,
        seed: int = 0,
        last_batch: str = "drop",
        num_threads: int = 2,
        prefetch: int = 4,
        *,
        purpose: Purpose | None = None,
        cache_mb: float = 256.0,
    ) -> None:
        if not 0 <= world_rank < world_size or micro_batch_size < 1 or prefetch < 1 or num_threads < 0:
            raise ConfigError(
                f"Rank {world_rank} of {world_size} with batches of {micro_batch_size}, {num_threads} threads and prefetch {prefetch} "
                "cannot load; expected 0 <= rank < world size, batch size and prefetch of at least 1."
            )
        if last_batch not in ("drop", "wrap"):
            raise ConfigError(f"data.last_batch is '{last_batch}'; expected drop or wrap.")
        self._storage, self._collator = storage, collator
        self._entries = open_split(storage, split, purpose or ("training" if collator.training else "validation"))
        self._rank, self._size = world_rank, micro_batch_size
        self._global = micro_batch_size * world_size
        self._seed, self._wrap = seed, last_batch == "wrap"
        self._num_threads, self._prefetch = num_threads, prefetch
        if self.steps_per_epoch == 0:
            raise DataError(
                f"The split '{split}' has {len(self._entries)} samples, fewer than one batch over all ranks ({world_size} ranks x "
                f"{micro_batch_size}); lower engine.micro_batch_size or run.num_train_workers, or set data.last_batch=wrap."
            )
        keys = hashlib.sha256()
        for entry in self._entries:
            keys.update(f"{entry.key}\n".encode())
        self._fingerprint = keys.hexdigest()
        self._epoch = self._consumed = 0
        self.bad_samples: Counter[str] = Counter()
        """Damaged samples met by this rank, by reason; one that is met in two epochs counts twice."""
        self._lock = threading.Lock()
        self._cache: dict[str, Sample] = {}
        self._cache_left = int(cache_mb * 2**20)

    def __len__(self) -> int:
        """Samples in the split."""
        return len(self._entries)

    @property
    def steps_per_epoch(self) -> int:
        """Micro batches per epoch, equal on all ranks, for an epoch that starts at its beginning."""
        return -(-len(self._entries) // self._global) if self._wrap else len(self._entries) // self._global

    def state_dict(self) -> dict[str, Any]:
        """Where the batches handed out so far end; plain JSON, equal on all ranks. What is only prefetched does not count."""
        return {"epoch": self._epoch, "samples_consumed": self._consumed, "seed": self._seed, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, at whatever world and batch size it was saved. Iterators made before keep their own way.

        Raises
        ------
        CheckpointError
            The state belongs to another data set or seed, or is damaged.
        """
        try:
            epoch, consumed = int(state["epoch"]), int(state["samples_consumed"])
            seed, fingerprint = int(state["seed"]), str(state["fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError("The loader's state is damaged; resume from an older checkpoint.") from error
        if fingerprint != self._fingerprint:
            raise CheckpointError(
                "The data set is not the one the checkpoint was trained on: its samples differ. Point data.url at the old one, or start a "
                "new run (run.name)."
            )
        if seed != self._seed:
            raise CheckpointError(f"The checkpoint's data order has seed {seed}, this run {self._seed}; set run.seed={seed} to resume.")
        if epoch < 0 or not 0 <= consumed <= len(self._entries):
            raise CheckpointError("The loader's state is out of range; resume from an older checkpoint.")
        self._epoch, self._consumed = epoch, consumed

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state on. One iterator at a time: each moves the loader's state."""
        plans = self._plans(self._epoch, self._consumed)
        if self._num_threads == 0:
            for plan in plans:
                batch = self._load(plan)
                self._epoch, self._consumed = plan.epoch, plan.consumed
                yield batch
            return
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="ssacl-loader")
        flying: deque[tuple[_Plan, Future[Batch]]] = deque()
        try:
            while True:
                while len(flying) < self._prefetch:
                    plan = next(plans)
                    flying.append((plan, pool.submit(self._load, plan)))
                plan, future = flying.popleft()
                batch = future.result()
                self._epoch, self._consumed = plan.epoch, plan.consumed
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _plans(self, epoch: int, consumed: int) -> Iterator[_Plan]:
        n = len(self._entries)
        while True:
            order = EpochOrder(n, self._seed, epoch)
            while consumed + self._global <= n or (self._wrap and consumed < n):
                start = consumed + self._rank * self._size
                consumed = min(consumed + self._global, n)
                yield _Plan(epoch, tuple(order[position % n] for position in range(start, start + self._size)), consumed)
            epoch, consumed = epoch + 1, 0

    def _load(self, plan: _Plan) -> Batch:
        rows: list[Row | None] = [self._row(self._entries[number], plan.epoch) for number in plan.numbers]
        sound = [index for index, row in enumerate(rows) if row is not None]
        if not sound:
            raise DataError(f"All {len(rows)} samples of a batch are damaged; run `ssacl data verify` on {self._storage.url}.")
        whole: list[Row] = []
        for index, row in enumerate(rows):
            stand_in = rows[next((other for other in sound if other > index), sound[0])]
            chosen = row or stand_in
            assert chosen is not None
            whole.append(chosen)
        return self._collator.join(whole)

    def _row(self, entry: SampleEntry, epoch: int) -> Row | None:
        try:
            return self._collator.row(self._sample(entry), epoch)
        except DataError as error:
            with self._lock:
                self.bad_samples[type(error).__name__] += 1
                num_bad = self.bad_samples.total()
            logger.warning("damaged sample %s left out (%d so far): %s", entry.key, num_bad, error)
            if num_bad > self._collator.config.max_bad_samples:
                raise DataError(
                    f"{num_bad} damaged samples, more than data.max_bad_samples={self._collator.config.max_bad_samples}; "
                    f"run `ssacl data verify` on {self._storage.url}."
                ) from error
            return None

    def _sample(self, entry: SampleEntry) -> Sample:
        sample = self._cache.get(entry.key)
        if sample is None:
            sample = read_sample(self._storage, entry)
            size = len(sample.image) + 2 * (len(sample.findings) + len(sample.impression)) + 1024
            with self._lock:
                if size <= self._cache_left and entry.key not in self._cache:
                    self._cache[entry.key] = sample
                    self._cache_left -= size
        return sample
