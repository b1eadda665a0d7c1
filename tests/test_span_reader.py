"""Reading ahead: neighbours in one range read, a budget of memory that only due samples may exceed, damage told and not raised."""

from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path

import pytest
from test_loader_exact import CountingStorage, write_shards

from ssacl.data.records import Sample
from ssacl.data.shards import ShardIndex
from ssacl.data.span_reader import SampleCache, SpanReader, Wanted
from ssacl.data.split_index import SplitIndex
from ssacl.errors import DataError, StorageError


class Reading:
    """A reader over 24 samples in 3 shards, all of one size."""

    def __init__(self, folder: Path, budget: int, cache: int = 0) -> None:
        stored = write_shards(folder, [8, 8, 8])
        self.storage = CountingStorage(stored)
        self.index = SplitIndex(ShardIndex.load(stored).samples("train"))
        self.size = self.index[0].json_offset + self.index[0].json_size - self.index[0].image_offset
        self.reader = SpanReader(self.storage, self.index, SampleCache(cache * self.size), 2, budget * self.size)  # type: ignore[arg-type]

    def request(self, now: list[int], later: Sequence[int] = ()) -> None:
        wanted = [[Wanted((0, number), number) for number in numbers] for numbers in (now, later)]
        wait(self.reader.request(*wanted))

    def take(self, *numbers: int) -> list[str]:
        samples = [self.reader.take((0, number)) for number in numbers]
        assert all(isinstance(sample, Sample) for sample in samples)
        return [sample.key for sample in samples if isinstance(sample, Sample)]


def test_neighbours_are_read_together_up_to_the_end_of_a_shard(tmp_path: Path) -> None:
    reading = Reading(tmp_path, budget=99)
    reading.request([4], [5, 6, 7, 8, 9])
    reading.request([9, 7])
    assert reading.take(4, 9, 7, 8) == ["k0004", "k0009", "k0007", "k0008"]
    assert reading.storage.reads == 2
    assert reading.reader.is_coming((0, 5))
    assert not reading.reader.is_coming((0, 4))
    assert reading.reader.held_bytes == 2 * reading.size


def test_the_budget_bounds_what_is_read_ahead_and_never_what_is_due(tmp_path: Path) -> None:
    reading = Reading(tmp_path, budget=3)
    reading.request([0], list(range(1, 8)))
    held = reading.reader.held_bytes / reading.size
    assert 2 <= held <= 4
    reading.request([8, 9, 10, 11, 12], [13, 14])
    assert reading.reader.held_bytes == (held + 5) * reading.size
    assert reading.take(0, 8, 9, 10, 11, 12) == ["k0000", "k0008", "k0009", "k0010", "k0011", "k0012"]
    reading.request([7])
    assert reading.take(7) == ["k0007"]


def test_what_is_kept_is_not_read_again(tmp_path: Path) -> None:
    reading = Reading(tmp_path, budget=0, cache=8)
    reading.request([0, 1])
    assert reading.take(0, 1) == ["k0000", "k0001"]
    assert reading.reader.held_bytes == 0
    reading.request([1])
    assert reading.take(1) == ["k0001"]
    assert reading.storage.reads == 1


def test_a_damaged_sample_is_read_again_and_told_and_its_neighbours_are_whole(tmp_path: Path) -> None:
    reading = Reading(tmp_path, budget=99)
    entry = reading.index[2]
    path = tmp_path / entry.shard
    content = bytearray(path.read_bytes())
    content[entry.image_offset + 20] ^= 1
    path.write_bytes(content)
    reading.request([1, 2, 3])
    damage = reading.reader.take((0, 2))
    assert isinstance(damage, DataError)
    assert "k0002" in str(damage)
    assert reading.take(1, 3) == ["k0001", "k0003"]
    assert reading.storage.retries["wrong_bytes"] >= 1


def test_a_shard_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    reading = Reading(tmp_path, budget=99)
    (tmp_path / reading.index[0].shard).unlink()
    reading.request([0])
    with pytest.raises(StorageError):
        reading.reader.take((0, 0))
