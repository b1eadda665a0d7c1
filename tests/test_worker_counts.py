"""Which numbers of train workers an elastic run may have: those over which the global batch can be dealt out."""

from __future__ import annotations

from typing import Any

import pytest

from ray_jobs.elastic import worker_counts
from ssacl.config import parse_config
from ssacl.errors import ConfigError


def counts(workers: Any, global_batch_size: int, accumulation_steps: int = 1) -> tuple[int, ...]:
    engine = {"global_batch_size": global_batch_size, "accumulation_steps": accumulation_steps}
    return worker_counts(parse_config({"engine": engine, "run": {"num_train_workers": workers}}))


def test_only_counts_that_deal_the_global_batch_out_are_taken() -> None:
    assert counts([1, 8], 24) == (1, 2, 3, 4, 6, 8)
    assert counts([2, 8], 24, accumulation_steps=4) == (2, 3, 6)
    assert counts(3, 24) == (3,)
    assert counts(3, 0) == (3,)


def test_what_cannot_be_dealt_out_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="24 cannot be dealt out evenly: 5 train workers"):
        counts(5, 24)
    with pytest.raises(ConfigError, match="cannot be dealt out evenly over any of 5 to 5 train workers"):
        counts([5, 5], 24)
    with pytest.raises(ConfigError, match=r"needs engine\.global_batch_size"):
        counts([1, 2], 0)
    with pytest.raises(ConfigError, match="give the smaller number first"):
        counts([4, 2], 8)
    with pytest.raises(ConfigError, match=r"run\.num_train_workers"):
        counts(0, 8)
