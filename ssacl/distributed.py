"""Collectives for losses that look across ranks; torch.distributed only, and no-ops without a process group.

Convention of every loss in `ssacl.losses`: a rank returns the share of its own rows, scaled so that the MEAN over ranks of the returned
values is the global loss. Data-parallel training averages gradients over ranks, and the backward of `gather_with_gradient` sums the
gradients that all ranks send to this rank's rows, so the averaged gradient is exactly that of the global loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Ranks in the process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def world_rank() -> int:
    """This process's rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.num_rows = tensor.shape[0]
        return _all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad)
        return grad.narrow(0, world_rank() * ctx.num_rows, ctx.num_rows)


def _all_gather(tensor: Tensor) -> Tensor:
    # gloo has no bool collectives on every build; bytes travel everywhere.
    sent = tensor.contiguous().to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
    received = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(received, sent)
    return torch.cat(received).to(tensor.dtype)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [B, ...] -> [W * B, ...], with exact gradients (see the module's convention).

    Every rank must call it, with the same number of rows.
    """
    if world_size() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return gathered


def gather_ragged(tensor: Tensor) -> Tensor:
    """As `gather_with_gradient`, for a number of rows that differs between the ranks; every rank must call it, also with none."""
    if world_size() == 1:
        return tensor
    counts = gather_detached(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padding = tensor.new_zeros((max(counts) - len(tensor), *tensor.shape[1:]))
    padded = torch.cat([tensor, padding])
    gathered = gather_with_gradient(padded) if tensor.is_floating_point() else gather_detached(padded)
    return torch.cat([gathered[rank * max(counts) :][:count] for rank, count in enumerate(counts)])


def gather_detached(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient."""
    tensor = tensor.detach()
    return tensor if world_size() == 1 else _all_gather(tensor)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Element-wise sum over ranks, without gradient."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def share_of_global(weight: Tensor) -> Tensor:
    """Factor from this rank's weighted sum to its share of the global weighted mean (the module's convention), without gradient."""
    return world_size() / sum_over_ranks(weight)


def local_rows(num_rows: int, device: torch.device) -> Tensor:
    """Where this rank's `num_rows` rows stand in a gathered tensor: [B] int64."""
    return world_rank() * num_rows + torch.arange(num_rows, device=device)
