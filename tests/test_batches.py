"""Batches without Ray and without a model."""

from __future__ import annotations

import asyncio
import time

import pytest

from serve.batches import Batches


def test_what_comes_one_by_one_while_a_batch_is_read_is_one_batch() -> None:
    sizes: list[int] = []

    def read(asked: list[int]) -> list[int]:
        sizes.append(len(asked))
        time.sleep(0.3)
        return [10 * each for each in asked]

    async def work() -> list[int]:
        batches: Batches[int, int] = Batches(read)
        batches.max_batch_size, batches.wait_s = 4, 0.01
        asked = []
        for number in range(6):
            asked.append(asyncio.create_task(batches.outcome(number)))
            await asyncio.sleep(0.03)
        return await asyncio.gather(*asked)

    assert asyncio.run(work()) == [0, 10, 20, 30, 40, 50]
    # Serve's own batching gives 1, 1, 1, 1, 1, 1 here.
    assert sizes == [1, 4, 1]


def test_the_first_waits_a_moment_for_others() -> None:
    sizes: list[int] = []

    async def work() -> None:
        batches: Batches[int, int] = Batches(lambda asked: sizes.append(len(asked)) or asked)
        batches.max_batch_size, batches.wait_s = 8, 0.3
        first = asyncio.create_task(batches.outcome(1))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, batches.outcome(2))

    asyncio.run(work())
    assert sizes == [2]


def test_an_error_is_told_to_its_batch_alone_and_who_has_gone_is_left_out() -> None:
    seen: list[list[int]] = []

    def read(asked: list[int]) -> list[int]:
        seen.append(asked)
        time.sleep(0.1)
        if 0 in asked:
            raise ZeroDivisionError
        return asked

    async def work() -> None:
        batches: Batches[int, int] = Batches(read)
        batches.max_batch_size = 2
        failing = asyncio.create_task(batches.outcome(0))
        await asyncio.sleep(0.02)
        assert batches.busy_since is not None
        gone, stays = (asyncio.create_task(batches.outcome(number)) for number in (1, 2))
        await asyncio.sleep(0.02)
        gone.cancel()
        with pytest.raises(ZeroDivisionError):
            await failing
        assert await stays == 2
        assert batches.busy_since is None

    asyncio.run(work())
    assert seen == [[0], [2]]
