"""The streaming loader over real shards: exact epochs, equal steps, resume at any world size, damage, splits."""

import gc
import itertools
import threading
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from test_collate import VISION, sample

from ssacl.config import DataConfig
from ssacl.data.collate import Collator
from ssacl.data.decoding import make_decoders
from ssacl.data.loader import StreamingLoader, open_split
from ssacl.data.order import LaneOrder
from ssacl.data.records import Sample
from ssacl.data.shards import ShardIndex, ShardWriter
from ssacl.data.span_reader import SampleCache, SpanReader
from ssacl.data.storage import Storage, open_storage
from ssacl.data.tokenization import Tokenizers, train_tokenizers
from ssacl.errors import CheckpointError, ConfigError, DataError, SplitError, StorageError

NUM_TRAIN = 23


def write_set(folder: Path, counts: dict[str, int], shard_size: int = 5, broken: tuple[str, ...] = ()) -> Storage:
    storage = open_storage(folder)
    shards = []
    for split, count in counts.items():
        for number, start in enumerate(range(0, count, shard_size)):
            writer = ShardWriter(storage, split, number)
            for index in range(start, min(start + shard_size, count)):
                key = f"{split}{index:03d}"
                made = sample(key)
                writer.add(Sample(key=key, image=b"broken", image_format="png") if key in broken else made)
            shards.append(writer.close())
    ShardIndex(tuple(shards)).save(storage)
    return storage


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return train_tokenizers(["Small right pleural effusion. Normal heart."], 300, 300)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return write_set(tmp_path_factory.mktemp("set"), {"train": NUM_TRAIN, "val": 3, "test": 4})


def loader(
    storage: Storage,
    tokenizers: Tokenizers,
    split: str = "train",
    *,
    training: bool = True,
    data: dict[str, object] | None = None,
    **more: object,
) -> StreamingLoader:
    config = DataConfig(**(data or {}))  # type: ignore[arg-type]
    more = {"num_threads": 0, "micro_batch_size": 2, **more}
    return StreamingLoader(storage, split, Collator(config, VISION, tokenizers, 0, training), **more)  # type: ignore[arg-type]


class KeysOnly(Collator):
    """The real collator's place in the loader, without pictures: `row` is the key."""

    def __init__(self, config: DataConfig) -> None:
        self.config, self.training = config, True

    def row(self, sample: Sample, epoch: int):  # type: ignore[no-untyped-def]
        return sample.key

    def join(self, rows):  # type: ignore[no-untyped-def]
        return list(rows)


def test_threads_give_the_same_batches_in_order(stored: Storage, tokenizers: Tokenizers) -> None:
    alone = iter(loader(stored, tokenizers, seed=3))
    threaded = iter(loader(stored, tokenizers, seed=3, num_threads=3))
    for _ in range(25):
        one, two = next(alone), next(threaded)
        assert one.keys == two.keys
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.text_ids, two.text_ids)
        assert torch.equal(one.mask_noise, two.mask_noise)


class HeldBack:
    """A storage whose range reads wait until they are let go."""

    def __init__(self, storage: Storage) -> None:
        self._storage, self.go = storage, threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._storage, name)

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        assert end is None or self.go.wait(20)
        return self._storage.read(key, start, end)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_batch_that_is_used_is_given_up(stored: Storage, tokenizers: Tokenizers, num_threads: int) -> None:
    """The reads that a batch waited for are held for later samples; that must not hold the batch."""
    storage = HeldBack(stored)
    each = loader(storage, tokenizers, data={"shuffle_lanes": 2, "shuffle_block": 8})  # type: ignore[arg-type]
    reader = SpanReader(storage, each._index, SampleCache(0), 2, 1 << 20)  # type: ignore[arg-type]
    decoders = make_decoders(each._collator, num_threads, "threads")
    job = each._start(next(each._plans(0, 0)), reader, decoders)
    storage.go.set()
    batch = weakref.ref(job.result().batch)  # type: ignore[arg-type]
    del job
    gc.collect()
    assert reader.held_bytes > 0
    assert batch() is None
    reader.close()
    decoders.close()


def test_state_counts_what_was_handed_out_not_what_is_prefetched(stored: Storage, tokenizers: Tokenizers) -> None:
    each = loader(stored, tokenizers, num_threads=2)
    way = iter(each)
    for _ in range(3):
        next(way)
    state = each.state_dict()
    assert state["samples_consumed"] == 6
    expected = next(way)
    again = loader(stored, tokenizers)
    again.load_state_dict(state)
    assert next(iter(again)).keys == expected.keys


def test_damaged_samples_are_replaced_counted_and_limited(tmp_path: Path, tokenizers: Tokenizers) -> None:
    storage = write_set(tmp_path, {"train": 8}, broken=("train003",))
    each = loader(storage, tokenizers, micro_batch_size=4)
    batches = [batch for batch, _ in zip(each, range(2), strict=False)]
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == 8
    assert "train003" not in keys
    assert sorted(Counter(keys).values()) == [1, 1, 1, 1, 1, 1, 2]
    assert each.bad_samples == {"ImageError": 1}
    again = [batch.keys for batch, _ in zip(loader(storage, tokenizers, micro_batch_size=4), range(2), strict=False)]
    assert again == [batch.keys for batch in batches]
    with pytest.raises(DataError, match=r"more than data\.max_bad_samples=0"):
        list(zip(loader(storage, tokenizers, micro_batch_size=4, data={"max_bad_samples": 0}), range(2), strict=False))


def test_a_batch_of_damaged_samples_alone_is_stood_in_for_and_a_set_of_them_stops(tmp_path: Path, tokenizers: Tokenizers) -> None:
    broken = tuple(f"train{index:03d}" for index in range(6))
    some = loader(write_set(tmp_path / "some", {"train": 8}, broken=broken), tokenizers, micro_batch_size=1, num_threads=2)
    keys = [key for batch in itertools.islice(some, 24) for key in batch.keys]
    assert set(keys) == {"train006", "train007"}
    # Three epochs: a sample that is met again is not counted again.
    assert some.bad_samples == {"ImageError": 6}
    every = loader(write_set(tmp_path / "all", {"train": 6}, broken=broken), tokenizers, micro_batch_size=1)
    with pytest.raises(DataError, match="or all that there are"):
        next(iter(every))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_damage_changes_neither_steps_nor_state_nor_global_batches(tmp_path: Path, tokenizers: Tokenizers, world: int) -> None:
    broken = ("train002", "train003", "train009")
    storage = write_set(tmp_path, {"train": 12}, broken=broken)
    order = LaneOrder(12, 5, 0, DataConfig().shuffle_lanes, DataConfig().shuffle_block)
    names = [f"train{order[position]:03d}" for position in range(12)]
    wanted = [next(name for name in names[position:] + names if name not in broken) for position in range(12)]
    ranks = [loader(storage, tokenizers, world_rank=rank, world_size=world, micro_batch_size=4 // world, seed=5) for rank in range(world)]
    ways = [iter(rank) for rank in ranks]
    for start in (0, 4, 8):
        keys = [key for way in ways for key in next(way).keys]
        assert sorted(keys) == sorted(wanted[start : start + 4])
        assert {rank.state_dict()["samples_consumed"] for rank in ranks} == {start + 4}


def test_flipped_bytes_in_a_shard_are_met_as_damage(tmp_path: Path, tokenizers: Tokenizers) -> None:
    storage = write_set(tmp_path, {"train": 5})
    entry = ShardIndex.load(storage).samples("train")[2]
    path = tmp_path / entry.shard
    content = bytearray(path.read_bytes())
    content[entry.image_offset + 40] ^= 0xFF
    path.chmod(0o644)
    path.write_bytes(bytes(content))
    each = loader(storage, tokenizers, micro_batch_size=5)
    assert entry.key not in next(iter(each)).keys
    assert each.bad_samples.total() == 1


def test_a_missing_shard_stops_the_run(tmp_path: Path, tokenizers: Tokenizers) -> None:
    storage = write_set(tmp_path, {"train": 10})
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(StorageError):
        list(zip(loader(storage, tokenizers, num_threads=2), range(5), strict=False))


def test_later_epochs_are_read_from_memory(tmp_path: Path, tokenizers: Tokenizers) -> None:
    storage = write_set(tmp_path, {"train": 4})
    one_at_a_time = {"prefetch_batches": 1}
    cached, uncached = (loader(storage, tokenizers, data=one_at_a_time | more) for more in ({}, {"cache_mb": 0}))
    ways = iter(cached), iter(uncached)
    for way in ways:
        next(way), next(way)
    (tmp_path / "train-000000.tar").unlink()
    assert len(next(ways[0])) == 2
    with pytest.raises(StorageError):
        next(ways[1])


def test_training_cannot_open_the_test_split(stored: Storage, tokenizers: Tokenizers) -> None:
    for purpose in ("training", "validation"):
        with pytest.raises(SplitError, match="must not read the test split"):
            open_split(stored, "test", purpose)  # type: ignore[arg-type]
    for training in (True, False):
        with pytest.raises(SplitError):
            loader(stored, tokenizers, "test", training=training)
    with pytest.raises(SplitError, match="'truth' is no split"):
        open_split(stored, "truth", "training")
    assert len(open_split(stored, "test", "evaluation")) == 4
    assert len(loader(stored, tokenizers, "test", training=False, purpose="evaluation")) == 4


def test_named_errors(stored: Storage, tokenizers: Tokenizers, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer than one batch over all ranks"):
        loader(stored, tokenizers, "val", micro_batch_size=2, world_size=2)
    assert loader(stored, tokenizers, "val", micro_batch_size=2, world_size=2, last_batch="wrap").steps_per_epoch == 1
    with pytest.raises(DataError, match="is empty"):
        open_split(write_set(tmp_path, {"train": 2}), "val", "validation")
    with pytest.raises(DataError, match="No data set"):
        open_split(open_storage(tmp_path / "nothing"), "train", "training")
    with pytest.raises(ConfigError, match="expected 0 <= rank"):
        loader(stored, tokenizers, world_rank=2, world_size=2)
    with pytest.raises(ConfigError, match="expected drop or wrap"):
        loader(stored, tokenizers, last_batch="keep")


def test_foreign_states_are_refused(stored: Storage, tokenizers: Tokenizers, tmp_path: Path) -> None:
    each = loader(stored, tokenizers, seed=1)
    state = each.state_dict()
    for change, message in (
        ({"fingerprint": "x"}, "not the one the checkpoint was trained on"),
        ({"seed": 2}, "run.seed=2"),
        ({"samples_consumed": 999}, "out of range"),
        ({"epoch": None}, "damaged"),
        ({"order": [8, 4]}, r"data\.shuffle_lanes=8 data\.shuffle_block=4 to resume"),
    ):
        with pytest.raises(CheckpointError, match=message):
            each.load_state_dict(state | change)
