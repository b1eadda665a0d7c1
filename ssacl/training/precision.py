"""Which arithmetic a run's matrix products use: bfloat16 pays only where the hardware multiplies it."""

from __future__ import annotations

import torch
from torch import distributed as dist

from ssacl.errors import ConfigError

_BF16_UNITS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
"""Names under which `torch.cpu.get_capabilities` lists instructions that multiply bfloat16 (x86-64, aarch64)."""


def multiplies_bf16(device: torch.device) -> bool:
    """Has the hardware instructions for bfloat16 products? Without them they are emulated, several times slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(unit)) for unit in _BF16_UNITS)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`engine.precision` for this device: "fp32", "bf16" or "fp16", the same on every rank.

    "auto" is bf16 where every rank's hardware multiplies it, else fp32. A collective call when a process group exists.

    Raises
    ------
    ConfigError
        fp16 on a CPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("engine.precision fp16 needs a GPU; on a CPU use engine.precision=auto, bf16 or fp32.")
    if precision != "auto":
        return precision
    able = torch.tensor(int(multiplies_bf16(device)), device=device)
    if dist.is_initialized():
        dist.all_reduce(able, op=dist.ReduceOp.MIN)
    return "bf16" if int(able) else "fp32"
