"""DeepSpeed's kernels are compiled by one process at a time, and a killed one stands in nobody's way."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from ssacl.errors import TrainingError
from ssacl.training.kernels import kernel_folder, load_kernels


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the kernels, with those in it; a process that has them loaded loads them once more."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    load_kernels()
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    return kernel_folder()


def test_what_a_killed_process_left_is_not_waited_for(compiled: Path) -> None:
    [kernel] = compiled.glob("*/*.so")
    (kernel.parent / "lock").touch()
    load_kernels()
    assert not (kernel.parent / "lock").exists()


def test_a_process_that_compiles_is_waited_for_and_ends_with_its_lock(compiled: Path) -> None:
    holds, holding = os.pipe()
    child = os.fork()
    if child == 0:
        with open(compiled / "ssacl.lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.write(holding, b"x")
            os.read(os.pipe()[0], 1)
    os.read(holds, 1)
    with open(compiled / "ssacl.lock", "w", encoding="ascii") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(child, 9)
        os.waitpid(child, 0)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    load_kernels()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(TrainingError, match="set TORCH_EXTENSIONS_DIR to another folder"):
        load_kernels()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "file")
