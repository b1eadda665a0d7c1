"""Whether the machine has the GPU that was asked for."""

from __future__ import annotations

import torch

from ssacl.errors import ClusterError


def require_gpu() -> None:
    """
    Raises
    ------
    ClusterError
        PyTorch finds no GPU in this process.
    """
    if not torch.cuda.is_available():
        why = "has no CUDA in it" if torch.version.cuda is None else "finds no driver and no device"
        raise ClusterError(
            f"A GPU was asked for, and PyTorch {torch.__version__} on this machine of the cluster {why}. Use the CUDA image "
            "(cluster/docker) on machines with NVIDIA's driver (nvidia-smi tells), or run without: run.use_gpu=false, gpus_per_replica: 0."
        )
