"""Samples -> batches ahead of their use: in the caller's thread, in threads, or in processes of their own.

A batch is made by a pure function of its samples, the epoch and the collator, so that all three give the same.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
import torch

from ssacl.data.collate import Collator
from ssacl.data.records import Batch, Sample
from ssacl.errors import DataError


@dataclass(frozen=True)
class Decoded:
    """A batch, or what keeps it from being one."""

    batch: Batch | None
    damage: dict[int, DataError]
    """Row -> why its sample cannot be used."""


class Pending(Protocol):
    """A batch that is being made."""

    def result(self) -> Decoded: ...


class Decoders(Protocol):
    """Where batches are made."""

    def submit(self, samples: Sequence[Sample | DataError], epoch: int) -> Pending: ...

    def close(self) -> None: ...


def make_decoders(collator: Collator, num: int, kind: str) -> Decoders:
    """`num` "threads" or "processes"; 0: in the thread that asks for the result."""
    if num == 0:
        return _Here(collator)
    return _Processes(collator, num) if kind == "processes" else _Threads(collator, num)


def decode(collator: Collator, samples: Sequence[Sample | DataError], epoch: int) -> Decoded:
    """Rows and their join; damage is told, not raised."""
    rows, damage = [], {}
    for index, sample in enumerate(samples):
        try:
            if isinstance(sample, DataError):
                raise sample
            rows.append(collator.row(sample, epoch))
        except DataError as error:
            damage[index] = error
    return Decoded(None if damage else collator.join(rows), damage)


class _Later:
    def __init__(self, call: Callable[[], Decoded]) -> None:
        self.result = call


class _Here:
    def __init__(self, collator: Collator) -> None:
        self._collator = collator

    def submit(self, samples: Sequence[Sample | DataError], epoch: int) -> Pending:
        return _Later(lambda: decode(self._collator, samples, epoch))

    def close(self) -> None:
        pass


class _Threads:
    def __init__(self, collator: Collator, num: int) -> None:
        self._collator = collator
        self._pool = ThreadPoolExecutor(num, thread_name_prefix="ssacl-loader")

    def submit(self, samples: Sequence[Sample | DataError], epoch: int) -> Pending:
        return self._pool.submit(decode, self._collator, samples, epoch)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Processes:
    """Started anew, not forked: a fork would copy locks of threads that it does not have."""

    def __init__(self, collator: Collator, num: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(num, context, initializer=_begin, initargs=(collator,))

    def submit(self, samples: Sequence[Sample | DataError], epoch: int) -> Pending:
        future = self._pool.submit(_decode_there, samples, epoch)
        return _Later(lambda: _received(future))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


_collator: Collator
"""Of this decoding process; set once when it starts."""


def _begin(collator: Collator) -> None:
    global _collator
    _collator = collator
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A killed parent closes nothing: without this its decoders would wait for ever.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _decode_there(samples: Sequence[Sample | DataError], epoch: int) -> tuple[dict[str, Any] | None, dict[int, DataError]]:
    decoded = decode(_collator, samples, epoch)
    if decoded.batch is None:
        return None, decoded.damage
    # The pictures go through shared memory, one file descriptor a batch; the small tensors are cheaper as bytes.
    fields = {item.name: getattr(decoded.batch, item.name) for item in dataclasses.fields(Batch)}
    small = {name: value.numpy() for name, value in fields.items() if isinstance(value, torch.Tensor) and name != "image"}
    return fields | small, {}


def _received(future: Future[Any]) -> Decoded:
    try:
        fields, damage = future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "A decoding process of the loader was killed, most often for want of memory. Lower data.num_loader_threads or "
            "data.prefetch_batches, or set data.loader_kind=threads, then resume."
        ) from error
    if fields is None:
        return Decoded(None, damage)
    tensors: dict[str, Any] = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in fields.items()}
    return Decoded(Batch(**tensors), {})
