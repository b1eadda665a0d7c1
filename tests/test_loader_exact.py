"""The loader's promise, over random shapes: every sample once per epoch over all ranks, equal steps, resume at any step and world size."""

import itertools
import json
import multiprocessing
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collate import VISION, same, sample
from test_loader import KeysOnly

from ssacl.config import DataConfig
from ssacl.data.collate import Collator
from ssacl.data.loader import StreamingLoader
from ssacl.data.shards import ShardIndex, ShardWriter
from ssacl.data.storage import Storage, open_storage
from ssacl.data.tokenization import train_tokenizers
from ssacl.errors import DataError

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def write_shards(folder: Path, sizes: list[int]) -> Storage:
    storage = open_storage(folder)
    shards, number = [], 0
    for index, size in enumerate(sizes):
        writer = ShardWriter(storage, "train", index)
        for _ in range(size):
            writer.add(sample(f"k{number:04d}", "No effusion."))
            number += 1
        shards.append(writer.close())
    ShardIndex(tuple(shards)).save(storage)
    return storage


class Group:
    """All ranks of a world, in step."""

    def __init__(self, storage: Storage, world: int, batch: int, seed: int, last_batch: str, threads: int, config: DataConfig) -> None:
        collator = KeysOnly(config)
        self.ranks = [StreamingLoader(storage, "train", collator, rank, world, batch, seed, last_batch, threads) for rank in range(world)]
        self.batch, self.size = batch, world * batch

    def advance(self, steps: int, seen: dict[int, list[str]]) -> None:
        """Move every rank by `steps`; what they gave is added to `seen` under its epoch."""
        ways = [iter(each) for each in self.ranks]
        for _ in range(steps):
            parts = [next(way) for way in ways]
            states = [each.state_dict() for each in self.ranks]
            assert all(state == states[0] for state in states)
            assert all(len(part) == self.batch for part in parts)
            seen.setdefault(states[0]["epoch"], []).extend(itertools.chain(*parts))
        for way in ways:
            way.close()  # type: ignore[attr-defined]


@settings(max_examples=80, deadline=None)
@given(
    sizes=SIZES,
    worlds=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    batches=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    stops=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    threads=st.sampled_from([0, 1, 3]),
    lanes=st.sampled_from([1, 2, 3, 8, 256]),
    block=st.sampled_from([1, 3, 16]),
    prefetch=st.integers(1, 5),
    budget_mb=st.sampled_from([0.0, 0.001, 64.0]),
    last_batch=st.sampled_from(["drop", "wrap"]),
    seed=st.integers(0, 99),
)
def test_every_epoch_is_exact_over_ranks_and_resumes(
    sizes: list[int],
    worlds: tuple[int, ...],
    batches: tuple[int, ...],
    stops: tuple[int, ...],
    threads: int,
    lanes: int,
    block: int,
    prefetch: int,
    budget_mb: float,
    last_batch: str,
    seed: int,
) -> None:
    """Two interruptions at any step, each followed by another world: no sample twice, none missing but a dropped rest."""
    order = {"shuffle_lanes": lanes, "shuffle_block": block}
    config = DataConfig(**order, prefetch_batches=prefetch, num_reader_threads=2, read_ahead_mb=budget_mb, cache_mb=0)
    n = sum(sizes)
    batches = tuple(1 if world * batch > n and last_batch == "drop" else batch for world, batch in zip(worlds, batches, strict=True))
    worlds = tuple(min(world, n) for world in worlds)
    seen: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        storage = write_shards(Path(folder), sizes)
        groups = [Group(storage, *shape, seed, last_batch, threads, config) for shape in zip(worlds, batches, strict=True)]
        for group, following, stop in zip(groups, groups[1:], stops, strict=False):
            group.advance(stop % (group.ranks[0].steps_per_epoch + 2), seen)
            state = json.loads(json.dumps(group.ranks[0].state_dict()))
            for each in following.ranks:
                each.load_state_dict(state)
        # To the end of the interrupted epoch, and one whole epoch more.
        last = groups[-1]
        left = n - state["samples_consumed"]
        last.advance((-(-left // last.size) if last_batch == "wrap" else left // last.size) + last.ranks[0].steps_per_epoch, seen)
    everything = {f"k{number:04d}" for number in range(n)}
    largest = max(group.size for group in groups)
    for epoch in range(state["epoch"] + 2):
        counts = Counter(seen.get(epoch, []))
        assert set(counts) <= everything
        if last_batch == "wrap":
            assert set(counts) == everything
            assert sum(counts.values()) < n + largest
        else:
            assert set(counts.values()) <= {1}
            assert len(counts) > n - largest


def test_global_batches_do_not_depend_on_the_world_size(tmp_path: Path) -> None:
    storage = write_shards(tmp_path, [7, 9, 7])
    config = DataConfig(shuffle_lanes=4, shuffle_block=4)

    def batches(world: int) -> list[set[str]]:
        ways = [iter(StreamingLoader(storage, "train", KeysOnly(config), rank, world, 4 // world, 7)) for rank in range(world)]
        return [set(itertools.chain(*(next(way) for way in ways))) for _ in range(12)]

    assert batches(1) == batches(2) == batches(4)


class CountingStorage:
    """Folder storage that notes its range reads."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.reads, self.num_bytes = storage, 0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._storage, name)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        content = self._storage.read(key, start, end)
        if end is not None:
            self.reads += 1
            self.num_bytes += len(content)
        return content


@pytest.mark.parametrize("world", [1, 2, 4])
def test_neighbours_come_in_one_read_and_no_rank_reads_for_another(tmp_path: Path, world: int) -> None:
    stored = write_shards(tmp_path, [64] * 4)
    # One batch at a time: nothing is begun for the next epoch.
    config = DataConfig(shuffle_lanes=8, shuffle_block=8, cache_mb=0, prefetch_batches=1)
    storages = [CountingStorage(stored) for _ in range(world)]
    for rank, storage in enumerate(storages):
        each = StreamingLoader(storage, "train", KeysOnly(config), rank, world, 2, 1)  # type: ignore[arg-type]
        way = iter(each)
        for _ in range(each.steps_per_epoch):
            next(way)
        way.close()  # type: ignore[attr-defined]
    # 32 blocks, some of them over the end of a shard or of a lane. Lanes of others that happen to lie between are read over.
    assert sum(storage.reads for storage in storages) < 256 / 4
    assert sum(storage.num_bytes for storage in storages) <= 1.1 * sum(shard.bytes for shard in ShardIndex.load(stored).shards)


@pytest.mark.slow
def test_processes_give_the_same_batches_and_a_killed_one_is_named(tmp_path: Path) -> None:
    storage = write_shards(tmp_path, [9, 4, 6])
    tokenizers = train_tokenizers(["No effusion."], 300, 300)

    def loader(kind: str) -> StreamingLoader:
        collator = Collator(DataConfig(loader_kind=kind), VISION, tokenizers, 0, True)
        return StreamingLoader(storage, "train", collator, 0, 1, 4, 3, "wrap", 2)

    threads, processes = loader("threads"), loader("processes")
    alone, apart = iter(threads), iter(processes)
    for _ in range(7):
        assert same(next(alone), next(apart))
        assert threads.state_dict() == processes.state_dict()
    decoders = multiprocessing.active_children()
    assert len(decoders) == 2
    for decoder in decoders:
        decoder.kill()
    with pytest.raises(DataError, match="decoding process of the loader was killed"):
        list(itertools.islice(apart, processes.steps_per_epoch))
    # The state is that of the last batch handed out.
    while threads.state_dict() != processes.state_dict():
        next(alone)
