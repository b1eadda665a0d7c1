"""DeepSpeed's kernels for the CPU, compiled once per machine.

torch guards the folder that it compiles in by a file. Where its process is killed the file stays, and every later process waits for it for
ever, a restarted train worker too. Here the guard is a lock of the operating system's, which ends with the process that holds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ssacl.errors import TrainingError

_LOCK = "ssacl.lock"
_VARIABLE = "TORCH_EXTENSIONS_DIR"


def kernel_folder() -> Path:
    """Where the kernels of this installation lie; no other program compiles there."""
    from torch.utils.cpp_extension import get_default_build_root

    # Another place or version of torch would compile them anew each time.
    installed = hashlib.sha256(f"{sys.version} {torch.__version__} {torch.__file__}".encode()).hexdigest()[:12]
    return Path(os.environ.get(_VARIABLE) or get_default_build_root()) / "ssacl" / installed


def load_kernels() -> None:
    """Compile and load them, one process of this machine at a time; DeepSpeed finds them loaded. Nothing to do on a GPU.

    Raises
    ------
    TrainingError
        The folder cannot be written.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not __compatible_ops__.get(builder.NAME, False):
        return
    folder = kernel_folder()
    with _alone_in(folder), _compiling_in(folder):
        for left in folder.glob("*/lock"):
            # Its process was killed: it would hold ours.
            left.unlink(missing_ok=True)
        builder.load()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / _LOCK, "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise TrainingError(
            f"DeepSpeed cannot compile its kernels in {folder}: {error.strerror}. Make room there, or set {_VARIABLE} to another folder."
        ) from error


@contextmanager
def _compiling_in(folder: Path) -> Iterator[None]:
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE)
        if before is not None:
            os.environ[_VARIABLE] = before
