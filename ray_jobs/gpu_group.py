"""A group of train workers on GPUs, which looks for them first.

NCCL would say in many words that there is no GPU, and Ray Train start the group again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from ssacl.errors import ClusterError
from ssacl.gpu import require_gpu


@dataclass
class GpuConfig(TorchConfig):
    """What `TorchConfig` is, and the `Board` of the run, which is told where a GPU is missing."""

    board: Any = None

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _GpuBackend


class _GpuBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: GpuConfig) -> None:
        worker_group.execute(_look_for_gpu, backend_config.board)
        super().on_start(worker_group, backend_config)


def _look_for_gpu(board: Any) -> None:
    try:
        require_gpu()
    except ClusterError as error:
        ray.get(board.fail.remote(type(error).__name__, str(error)))
        raise
