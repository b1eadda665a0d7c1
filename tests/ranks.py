"""Runs a function on a few gloo ranks of this machine."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

TIMEOUT_S = 120


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> None:
    """Call `function(world_rank, world_size, *arguments)` in `world_size` new processes with a process group; an error of any is raised.

    `folder` takes the store of the group and must be new to each call.
    """
    folder.mkdir(parents=True)
    # One server with the imports done, of which the ranks are forks: they start in no time.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["ssacl.training.loop", "deepspeed"])
    multiprocessing.start_processes(
        _rank, (world_size, str(folder / "store"), function, arguments), nprocs=world_size, start_method="forkserver"
    )


def _rank(world_rank: int, world_size: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(world_rank)
    torch.set_num_threads(1)
    group = dist.FileStore(store, world_size)
    dist.init_process_group("gloo", store=group, rank=world_rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        function(world_rank, world_size, *arguments)
    finally:
        dist.destroy_process_group()
