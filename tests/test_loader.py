"""The streaming loader over real shards: exact epochs, equal steps, resume at any world size, damage, splits."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collate import VISION, sample

from ssacl.config import DataConfig
from ssacl.data.collate import Collator
from ssacl.data.loader import StreamingLoader, open_split
from ssacl.data.records import Sample
from ssacl.data.shards import ShardIndex, ShardWriter
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

    def __init__(self) -> None:
        self.config, self.training = DataConfig(), True

    def row(self, sample: Sample, epoch: int):  # type: ignore[no-untyped-def]
        return sample.key

    def join(self, rows):  # type: ignore[no-untyped-def]
        return list(rows)


@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 4),
    batch=st.integers(1, 4),
    new_world=st.integers(1, 4),
    new_batch=st.integers(1, 4),
    stop=st.integers(0, 30),
    threads=st.sampled_from([0, 2]),
    wrap=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_epoch_is_exact_over_ranks_and_resumes(
    stored: Storage, world: int, batch: int, new_world: int, new_batch: int, stop: int, threads: int, wrap: bool, seed: int
) -> None:
    """Samples handed out in the epoch that was interrupted, by both worlds together: none twice, none missing but a dropped rest."""

    last_batch = "wrap" if wrap else "drop"

    def ranks(size: int, micro: int) -> list[StreamingLoader]:
        return [StreamingLoader(stored, "train", KeysOnly(), rank, size, micro, seed, last_batch, threads) for rank in range(size)]

    seen: dict[int, list[str]] = {}

    def advance(loaders: list[StreamingLoader], steps: int) -> None:
        ways = [iter(each) for each in loaders]
        for _ in range(steps):
            parts = [next(way) for way in ways]
            states = [each.state_dict() for each in loaders]
            assert all(state == states[0] for state in states)
            assert all(len(part) == len(parts[0]) for part in parts)
            seen.setdefault(states[0]["epoch"], []).extend(itertools.chain(*parts))

    first = ranks(world, batch)
    steps = stop % (2 * first[0].steps_per_epoch + 1)
    advance(first, steps)
    state = json.loads(json.dumps(first[0].state_dict()))
    second = ranks(new_world, new_batch)
    for each in second:
        each.load_state_dict(state)
    # To the end of the interrupted epoch, and one whole epoch more.
    epoch = state["epoch"]
    left = NUM_TRAIN - state["samples_consumed"]
    size = new_world * new_batch
    advance(second, (-(-left // size) if wrap else left // size) + second[0].steps_per_epoch)
    everything = {f"train{index:03d}" for index in range(NUM_TRAIN)}
    for number in range(epoch + 2):
        counts = Counter(seen.get(number, []))
        assert set(counts) <= everything
        if wrap:
            assert set(counts) == everything
            assert sum(counts.values()) < NUM_TRAIN + max(size, world * batch)
        else:
            assert set(counts.values()) <= {1}
            assert len(counts) > NUM_TRAIN - max(size, world * batch)


def test_global_batches_do_not_depend_on_the_world_size(stored: Storage) -> None:
    def batches(world: int) -> list[set[str]]:
        ways = [iter(StreamingLoader(stored, "train", KeysOnly(), rank, world, 4 // world, 7)) for rank in range(world)]
        return [set(itertools.chain(*(next(way) for way in ways))) for _ in range(12)]

    assert batches(1) == batches(2) == batches(4)


def test_threads_give_the_same_batches_in_order(stored: Storage, tokenizers: Tokenizers) -> None:
    alone = iter(loader(stored, tokenizers, seed=3))
    threaded = iter(loader(stored, tokenizers, seed=3, num_threads=3))
    for _ in range(25):
        one, two = next(alone), next(threaded)
        assert one.keys == two.keys
        assert torch.equal(one.image, two.image)
        assert torch.equal(one.text_ids, two.text_ids)
        assert torch.equal(one.mask_noise, two.mask_noise)


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
    with pytest.raises(DataError, match="All 1 samples of a batch are damaged"):
        list(zip(loader(storage, tokenizers, micro_batch_size=1, num_threads=2), range(8), strict=False))


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
    cached, uncached = loader(storage, tokenizers), loader(storage, tokenizers, data={"cache_mb": 0})
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
    ):
        with pytest.raises(CheckpointError, match=message):
            each.load_state_dict(state | change)
