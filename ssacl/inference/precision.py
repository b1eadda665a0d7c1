"""A model made ready to write only: in the numbers that were asked for, its weights laid out as the processor reads them fastest.

`fp32` changes nothing but the order of sums. On a CPU the weights of the vision encoder and the language model are packed once for oneDNN:
products of few rows, as in decoding, run twice as fast as from the plain layout. `bf16` halves the memory that every token reads, which
pays where the processor multiplies bfloat16. `int8` (CPU) has a scale for each row of the weights and one for the activations of each call.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssacl.errors import ConfigError
from ssacl.models.ssacl import SSACL

logger = logging.getLogger(__name__)
Precision = Literal["fp32", "bf16", "int8"]


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's own layout, for a CPU."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
        self._bias = bias_O

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return product


class Int8Linear(nn.Module):
    """A linear layer with weights in 8 bits; activations are put into 8 bits on the way, by their range over the whole call."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        scale_O = weight_OI.abs().amax(1).clamp_min(1e-12) / 127
        with warnings.catch_warnings():
            # torch announces that tensors with quantized types will go; the successor has no CPU kernel that is as fast without VNNI.
            warnings.simplefilter("ignore", UserWarning)
            rows = torch.quantize_per_channel(weight_OI.contiguous(), scale_O.double(), torch.zeros_like(scale_O).long(), 0, torch.qint8)
            self._packed: Any = torch.ops.quantized.linear_prepack(rows, bias_O)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic(x, self._packed, True)
        return product


def prepare(model: SSACL, precision: Precision) -> None:
    """Make the model ready, in place. It can neither be trained nor saved afterwards.

    Raises
    ------
    ConfigError
        `int8` on a device that is no CPU.
    """
    on_cpu = model.tau.device.type == "cpu"
    if precision == "int8" and not on_cpu:
        raise ConfigError("Precision int8 is for CPUs: use bf16 on a GPU.")
    parts: list[nn.Module] = [model.encoder.blocks, model.language.model]
    model.fix_queries()
    with torch.no_grad():
        if precision == "bf16":
            model.language.model.to(torch.bfloat16)
        elif precision == "int8":
            for part in parts:
                _replace(part, Int8Linear)
        elif on_cpu and torch._C._has_mkldnn:
            for part in parts:
                _replace(part, PackedLinear)


def _replace(part: nn.Module, kind: type[PackedLinear] | type[Int8Linear]) -> None:
    for name, module in list(part.named_modules()):
        for child_name, child in module.named_children():
            # Adapters are read by their own names, and are small.
            if "lora_" in f"{name}.{child_name}" or type(child) not in (nn.Linear, Conv1D):
                continue
            weight = child.weight.detach().t() if isinstance(child, Conv1D) else child.weight.detach()
            setattr(module, child_name, kind(weight, None if child.bias is None else child.bias.detach()))
