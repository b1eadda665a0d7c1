"""Dropout that is cheap on a CPU, and the attention of the text models that uses it.

torch draws one random number for every element, through a generator that takes about 13 ns on a CPU: 7 % of a training step in bfloat16.
Sixteen bits decide as well (the share of dropped elements is right to 1 in 100,000), and four decisions fit into one draw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

_LEVELS = 2**16
PLAIN_ATTENTION = "ssacl_plain"
"""Name under which `plain_attention` is known to transformers."""


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        kept = (bits[: x.numel()] >= round(share * _LEVELS) - _LEVELS // 2).view(x.shape)
        ctx.save_for_backward(kept)
        ctx.scale = 1 / (1 - share)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradients[0] * kept).mul_(ctx.scale), None


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout`, with its random numbers from the same generator, four to a draw on a CPU."""
    if not training or share == 0 or x.numel() == 0:
        return x
    if x.device.type != "cpu" or share >= 1:
        return functional.dropout(x, share, training)
    dropped: Tensor = _Dropped.apply(x, share)  # type: ignore[no-untyped-call]
    return dropped


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training)


def use_cheap_dropout(model: nn.Module) -> None:
    """Put `Dropout` in the place of every `torch.nn.Dropout` of the model."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain products, [B, H, T, d] -> [B, T, H, d], as transformers' "eager", with the cheap dropout."""
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(-2, -1)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = _dropout(scores.softmax(-1).to(value.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


_dropout = dropout
AttentionInterface.register(PLAIN_ATTENTION, plain_attention)
AttentionMaskInterface.register(PLAIN_ATTENTION, eager_mask)
