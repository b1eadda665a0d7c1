"""The order of an epoch: a permutation, mixed over the whole set, new in each epoch, with neighbours that can be read together."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssacl.data.order import EpochOrder, LaneOrder


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_the_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = EpochOrder(n, seed, epoch)
    assert sorted(order[position] for position in range(n)) == list(range(n))


@given(n=st.integers(1, 3000), lanes=st.integers(1, 300), block=st.integers(1, 40), seed=st.integers(0, 2**63), epoch=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_the_order_of_lanes_is_a_permutation(n: int, lanes: int, block: int, seed: int, epoch: int) -> None:
    order = LaneOrder(n, seed, epoch, lanes, block)
    assert sorted(order[position] for position in range(n)) == list(range(n))
    assert order.block_size == 1 or n // order.num_lanes >= order.block_size


@pytest.mark.parametrize("block", [1, 16])
def test_the_order_is_mixed_and_new_in_each_epoch(block: int) -> None:
    n = 16_000
    first, second, other = (list(LaneOrder(n, seed, epoch, 250, block)) for seed, epoch in ((0, 0), (0, 1), (1, 0)))
    for order in (first, second, other):
        # Each tenth of the epoch draws from the whole set: its mean is near the middle (standard error of 100 blocks: 462).
        assert all(abs(sum(order[i : i + 1600]) / 1600 - n / 2) < 5 * 462 for i in range(0, n, 1600))
    for left, right in itertools.combinations((first, second, other), 2):
        assert sum(a == b for a, b in zip(left, right, strict=True)) < 40
        # Other neighbours share a block: what is 250 positions apart in one order is not in the other.
        pairs = [{(order[i], order[i + 250]) for i in range(n - 250)} for order in (left, right)]
        assert len(pairs[0] & pairs[1]) < (200 if block == 1 else 0.97 * n)


def test_a_batch_takes_one_sample_of_a_block_at_most() -> None:
    """The price of reading neighbours together, in what is trained on together: none up to as many samples as there are lanes."""
    n, batch = 8192, 256
    order = LaneOrder(n, 3, 0, 256, 16)
    numbers = list(order)
    close = Counter(
        right - left <= 1 for start in range(0, n, batch) for left, right in itertools.pairwise(sorted(numbers[start : start + batch]))
    )
    # Of a purely random order's batch, 255 * 256 / 8192 = 8 pairs are direct neighbours.
    assert close[True] / (n // batch) < 8


@given(n=st.integers(1, 2000), lanes=st.integers(1, 64), block=st.integers(1, 20), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=60, deadline=None)
def test_later_positions_of_a_block_hold_its_neighbours(n: int, lanes: int, block: int, seed: int, data: st.DataObject) -> None:
    order = LaneOrder(n, seed, 0, lanes, block)
    position, end = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n))
    mates = list(order.same_block(position, end))
    assert len(mates) < order.block_size
    assert all(position < mate < end and (mate - position) % order.num_lanes == 0 for mate in mates)
    offsets = [(order[mate] - order[position]) % n for mate in mates]
    assert offsets == list(range(1, len(mates) + 1))
