"""Copies of training state in host memory, written to disk while training goes on.

A copy takes a fraction of the time of a file; it costs the host as much memory as the state until it is written.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class HostCopies:
    """States that are copied when they are added, and written by `write`, from any thread."""

    def __init__(self) -> None:
        self._states: list[tuple[Any, Path]] = []

    def add(self, state_dict: Any, path: str | Path) -> None:
        """Copy `state_dict` (dicts, lists and tuples of tensors and small objects); it is to be written to `path`.

        The names are those by which DeepSpeed calls its writer.
        """
        done: dict[tuple[Any, ...], Tensor] = {}
        self._states.append((_copy(state_dict, done), Path(path)))
        for device in {key[0] for key in done if key[0].type == "cuda"}:
            # Copies into pinned memory are only started above.
            torch.cuda.synchronize(device)

    def write(self) -> None:
        """Write every file, and let go of the copies."""
        while self._states:
            state, path = self._states.pop()
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, path)


def _copy(value: Any, done: dict[tuple[Any, ...], Tensor]) -> Any:
    """`value` with tensors that share nothing with the given ones; those tied among each other stay tied."""
    if isinstance(value, Tensor):
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() == 0:
            return value.detach().cpu().clone()
        if key not in done:
            # Only what the tensor shows: a view's file must not hold the whole buffer behind it.
            target = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            done[key] = target.copy_(value.detach(), non_blocking=True)
        return done[key]
    if isinstance(value, dict):
        # A state_dict's type carries attributes that loading reads; the copy of its frame keeps them.
        copied = copy.copy(value)
        for name, item in value.items():
            copied[name] = _copy(item, done)
        return copied
    if type(value) in (list, tuple):
        return type(value)(_copy(item, done) for item in value)
    return copy.deepcopy(value)
