"""engine.precision auto: bfloat16 only where every rank's hardware multiplies it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

from ssacl.errors import ConfigError
from ssacl.training import precision

CPU = torch.device("cpu")


def test_auto_follows_the_hardware(monkeypatch):
    for capabilities, expected in (
        ({"avx512_bf16": False, "avx2": True}, "fp32"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert precision.resolve_precision("auto", CPU) == expected


def test_what_is_named_is_kept_and_fp16_needs_a_gpu():
    assert precision.resolve_precision("bf16", CPU) == "bf16"
    assert precision.resolve_precision("fp32", CPU) == "fp32"
    with pytest.raises(ConfigError, match="needs a GPU"):
        precision.resolve_precision("fp16", CPU)


def _rank(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=60))
    precision.multiplies_bf16 = lambda device: rank == 0
    Path(f"{out}{rank}").write_text(precision.resolve_precision("auto", CPU))
    dist.destroy_process_group()


def test_one_rank_without_the_instructions_decides_for_all(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["fp32", "fp32"]
