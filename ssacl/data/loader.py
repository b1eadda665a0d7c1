"""Streaming loader: every sample once per epoch over all ranks, in an order that is a pure function of (seed, epoch).

The order (`ssacl.data.order`) is computed position by position. Global micro batch g takes positions [g * W * b, (g + 1) * W * b) and
rank r every W-th of them, so that what is trained on together does not depend on W as long as W * b does not. The state is the epoch and
the number of samples consumed over all ranks: any other (W, b) goes on from there, nothing repeated, nothing skipped.

The last partial batch of an epoch: "drop" leaves it out (other samples in each epoch), "wrap" fills it from the epoch's first positions.

A damaged sample is counted by reason, and the next sound one of the epoch's order stands in for it, whichever rank has that: the number of
steps, the state and what is trained on together stay what they are. Past `max_bad_samples` different ones on a rank the run stops.
Storage that cannot be reached is no damage: it stops the run, after the retries of `ssacl.data.storage`.

A batch is read (`span_reader`), decoded (`decoding`) and handed out in order. At most `prefetch_batches` of them are on the way: none is
begun before one is taken.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from ssacl.data.collate import Collator
from ssacl.data.decoding import Decoded, Decoders, Pending, make_decoders
from ssacl.data.order import LaneOrder
from ssacl.data.records import SPLITS, Batch
from ssacl.data.shards import SampleEntry, ShardIndex
from ssacl.data.span_reader import SampleCache, SpanReader, Wanted
from ssacl.data.split_index import SplitIndex
from ssacl.data.storage import Storage
from ssacl.data.truth_guard import refuse_truth
from ssacl.errors import CheckpointError, ConfigError, DataError, SplitError

logger = logging.getLogger(__name__)

Purpose = Literal["training", "validation", "evaluation", "prediction"]


@dataclass(frozen=True)
class _Plan:
    """One micro batch of this rank, before anything is read."""

    order: LaneOrder
    epoch: int
    positions: tuple[int, ...]
    end: int
    """Position after the last that any rank uses in this epoch."""
    consumed: int
    """Samples of the epoch that are consumed over all ranks once this batch is trained on."""


class _Job:
    """A micro batch on its way: decoding begins by itself when the last of its samples is read."""

    def __init__(self, plan: _Plan, reader: SpanReader, decoders: Decoders, now: list[Wanted], later: Iterable[Wanted]) -> None:
        self.plan, self.numbers = plan, [wanted.number for wanted in now]
        self._pending: Future[Pending] = Future()
        reads = reader.request(now, later)
        left = iter(range(len(reads) - 1, -1, -1))

        def one_read(_: Future[Any]) -> None:
            # `next` on an iterator is one step of the interpreter: no two threads see the same number.
            if next(left) > 0:
                return
            try:
                samples = [reader.take(wanted.place) for wanted in now]
                self._pending.set_result(decoders.submit(samples, plan.epoch))
            except Exception as error:
                self._pending.set_exception(error)

        for read in reads:
            read.add_done_callback(one_read)

    def result(self) -> Decoded:
        """To be asked for once: reads that a job waited for outlive it, with their callbacks, and must not keep its batch."""
        decoded = self._pending.result().result()
        del self._pending
        return decoded


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
        Threads or processes (`data.loader_kind`) that decode ahead; 0 decodes in the caller's thread.
    purpose
        None: "training" for a training collator, else "validation". Evaluation must say so.

    The rest of how samples are ordered and read (`shuffle_lanes`, `num_reader_threads`, `cache_mb`, ...) stands in the collator's
    `DataConfig`.

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
        *,
        purpose: Purpose | None = None,
    ) -> None:
        if not 0 <= world_rank < world_size or micro_batch_size < 1 or num_threads < 0:
            raise ConfigError(
                f"Rank {world_rank} of {world_size} with batches of {micro_batch_size} and {num_threads} threads cannot load; expected "
                "0 <= rank < world size and a batch size of at least 1."
            )
        if last_batch not in ("drop", "wrap"):
            raise ConfigError(f"data.last_batch is '{last_batch}'; expected drop or wrap.")
        self.storage, self._collator, self._config = storage, collator, collator.config
        self._index = SplitIndex(open_split(storage, split, purpose or ("training" if collator.training else "validation")))
        self._rank, self._world, self._size = world_rank, world_size, micro_batch_size
        self._global = micro_batch_size * world_size
        self._seed, self._wrap = seed, last_batch == "wrap"
        self._num_threads = num_threads
        if self.steps_per_epoch == 0:
            raise DataError(
                f"The split '{split}' has {len(self)} samples, fewer than one batch over all ranks ({world_size} ranks x "
                f"{micro_batch_size}); lower engine.micro_batch_size or run.num_train_workers, or set data.last_batch=wrap."
            )
        if world_rank == 0 and self._config.shuffle_block > 1 and self._global > self._config.shuffle_lanes:
            logger.warning(
                "a global batch of %d samples is larger than data.shuffle_lanes=%d: it holds neighbours of a shard, often films of one "
                "patient; raise shuffle_lanes (and read_ahead_mb), or set data.shuffle_block=1",
                *(self._global, self._config.shuffle_lanes),
            )
        self._fingerprint = self._index.fingerprint()
        self._epoch = self._consumed = 0
        self._cache = SampleCache(int(self._config.cache_mb * 2**20))
        self._damaged: set[int] = set()
        self.bad_samples: Counter[str] = Counter()
        """Different damaged samples that this rank met since it started, by reason."""

    def __len__(self) -> int:
        """Samples in the split."""
        return len(self._index)

    @property
    def steps_per_epoch(self) -> int:
        """Micro batches per epoch, equal on all ranks, for an epoch that starts at its beginning."""
        return -(-len(self) // self._global) if self._wrap else len(self) // self._global

    def state_dict(self) -> dict[str, Any]:
        """Where the batches handed out so far end; plain JSON, equal on all ranks. What is only prefetched does not count."""
        order = [self._config.shuffle_lanes, self._config.shuffle_block]
        state = {"epoch": self._epoch, "samples_consumed": self._consumed, "seed": self._seed}
        return state | {"order": order, "fingerprint": self._fingerprint}

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
            num_lanes, block_size = (int(value) for value in state["order"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError("The loader's state is damaged; resume from an older checkpoint.") from error
        if fingerprint != self._fingerprint:
            raise CheckpointError(
                "The data set is not the one the checkpoint was trained on: its samples differ. Point data.url at the old one, or start a "
                "new run (run.name)."
            )
        if seed != self._seed:
            raise CheckpointError(f"The checkpoint's data order has seed {seed}, this run {self._seed}; set run.seed={seed} to resume.")
        if (num_lanes, block_size) != (self._config.shuffle_lanes, self._config.shuffle_block):
            raise CheckpointError(
                f"The checkpoint's data order is another; set data.shuffle_lanes={num_lanes} data.shuffle_block={block_size} to resume."
            )
        if epoch < 0 or not 0 <= consumed <= len(self):
            raise CheckpointError("The loader's state is out of range; resume from an older checkpoint.")
        self._epoch, self._consumed = epoch, consumed

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current state on. One iterator at a time: each moves the loader's state.

        After an error the loader's state is that of the last batch handed out: a new iterator goes on from there.

        Raises
        ------
        DataError
            Too many samples are damaged, or a decoding process was killed.
        StorageError
            Storage cannot be reached, or a shard is gone.
        """
        config = self._config
        reader = SpanReader(self.storage, self._index, self._cache, config.num_reader_threads, int(config.read_ahead_mb * 2**20))
        decoders = make_decoders(self._collator, self._num_threads, config.loader_kind)
        plans = self._plans(self._epoch, self._consumed)
        jobs: deque[_Job] = deque()
        try:
            while True:
                while len(jobs) < config.prefetch_batches:
                    jobs.append(self._start(next(plans), reader, decoders))
                job = jobs.popleft()
                decoded = job.result()
                while decoded.batch is None:
                    self._count(job, decoded)
                    job = self._start(job.plan, reader, decoders, again=True)
                    decoded = job.result()
                self._epoch, self._consumed = job.plan.epoch, job.plan.consumed
                yield decoded.batch
        finally:
            reader.close()
            decoders.close()

    def _plans(self, epoch: int, consumed: int) -> Iterator[_Plan]:
        n = len(self)
        while True:
            order = LaneOrder(n, self._seed, epoch, self._config.shuffle_lanes, self._config.shuffle_block)
            end = n if self._wrap else n - (n - consumed) % self._global
            while consumed < end:
                start = consumed + self._rank
                consumed = min(consumed + self._global, n)
                yield _Plan(order, epoch, tuple(range(start, start + self._global, self._world)), end, consumed)
            epoch, consumed = epoch + 1, 0

    def _start(self, plan: _Plan, reader: SpanReader, decoders: Decoders, again: bool = False) -> _Job:
        now = [self._wanted(plan, position) for position in plan.positions]
        # A sample that is made again has passed its neighbours.
        later = () if again else self._later(plan, [wanted.place[1] for wanted in now if not reader.is_coming(wanted.place)])
        return _Job(plan, reader, decoders, now, later)

    def _later(self, plan: _Plan, positions: list[int]) -> Iterator[Wanted]:
        """What lies in one block with these and comes to this rank after them."""
        for position in positions:
            if position < len(self):
                for mate in plan.order.same_block(position, plan.end):
                    if (mate - position) % self._world == 0:
                        yield self._wanted(plan, mate)

    def _wanted(self, plan: _Plan, position: int) -> Wanted:
        """The sample of a position, or the next sound one."""
        sound = position
        while (number := plan.order[sound % len(self)]) in self._damaged:
            sound += 1
        return Wanted((plan.epoch, position), number)

    def _count(self, job: _Job, decoded: Decoded) -> None:
        for row, error in decoded.damage.items():
            number = job.numbers[row]
            if number in self._damaged:
                continue
            self._damaged.add(number)
            self.bad_samples[type(error).__name__] += 1
            num_bad = len(self._damaged)
            logger.warning("damaged sample %s left out (%d so far): %s", self._index[number].key, num_bad, error)
            if num_bad > self._config.max_bad_samples or num_bad == len(self):
                raise DataError(
                    f"{num_bad} damaged samples, more than data.max_bad_samples={self._config.max_bad_samples} or all that there are; "
                    f"run `ssacl data verify` on {self.storage.url}."
                ) from error
