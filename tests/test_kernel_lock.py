"""A lock that a killed build of DeepSpeed's kernels left is named, not waited for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ssacl.errors import TrainingError
from ssacl.training.deepspeed_engine import STALE_LOCK_S, _refuse_stale_locks


@pytest.mark.parametrize("place", ["deepspeed_shm_comm", "py311_cpu/deepspeed_shm_comm"])
def test_an_old_lock_is_named_and_a_young_one_is_a_build_at_work(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    _refuse_stale_locks()
    lock = tmp_path / place / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    _refuse_stale_locks()
    old = time.time() - STALE_LOCK_S - 60
    os.utime(lock, (old, old))
    with pytest.raises(TrainingError, match="16 minutes old, left by a build that was killed"):
        _refuse_stale_locks()
