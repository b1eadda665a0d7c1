"""`python -m ssacl.training --config X.yaml [key=value ...]`: the loop without Ray, in one process or under torchrun."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import torch
import torch.distributed as dist

from ssacl.config import Config, load_config
from ssacl.errors import SSACLError
from ssacl.training.dry_run import dry_run
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter


@contextmanager
def process_group(world_rank: int, world_size: int, device: torch.device) -> Iterator[None]:
    """A torch.distributed group: torchrun's, or one of a single process (DeepSpeed asks for a group even then)."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    launched = "LOCAL_RANK" in os.environ
    if world_size > 1:
        dist.init_process_group(backend)
    else:
        # DeepSpeed insists on the variable that launchers set.
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group(backend, store=torch.distributed.HashStore(), rank=world_rank, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()
        if not launched:
            # It goes with the group: libraries that find it take this process for one of several.
            os.environ.pop("LOCAL_RANK", None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; gives the exit status: 0 done, 1 a named error."""
    parser = argparse.ArgumentParser(prog="python -m ssacl.training", description=__doc__)
    parser.add_argument("--config", required=True, metavar="YAML", help="a file of configs/, or your own")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration, sizes, memory and steps; start nothing")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in optim.lr=1e-4")
    options = parser.parse_args(arguments)
    world_rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s rank {world_rank} %(levelname)s %(message)s")
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            print(dry_run(config, world_size), end="")
            return 0
        device = _device(config)
        with closing(LogReporter(world_rank)) as reporter, process_group(world_rank, world_size, device):
            outcome = train(config, reporter, world_rank, world_size, device)
    except SSACLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if world_rank == 0:
        print(f"model: {outcome.model_url}")
    return 0


def _device(config: Config) -> torch.device:
    if not config.run.use_gpu:
        torch.set_num_threads(max(1, int(config.run.cpus_per_train_worker)))
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    sys.exit(main())
