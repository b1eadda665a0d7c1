"""ZeRO 3 for a model of which only the language model is divided.

DeepSpeed gathers and drops weights by hooks on modules. They need tensors going in and out, and the same modules called in the same order
on every rank; the language model's modules are so. The rest of the model hands dataclasses on, calls methods of its parts, and skips the
text encoder on a rank without a sentence: it has no hooks, and a whole copy of each of its weights stays on every rank, beside the share
that gradients and optimizer work on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssacl.distributed import world_rank
from ssacl.models.divided import full_shape, is_divided

LIVE_NUMBERS = 50_000_000
"""Numbers of the language model that a rank gathers ahead, and keeps for the next use, at most."""
SMALL_NUMBERS = 10_000
"""Up to this size a weight of the language model (norms, biases) is kept whole between uses."""


def zero3_settings() -> dict[str, Any]:
    """What stage 3 adds to DeepSpeed's `zero_optimization` section."""
    return {
        "stage3_prefetch_bucket_size": LIVE_NUMBERS,
        "stage3_max_reuse_distance": LIVE_NUMBERS,
        "stage3_max_live_parameters": LIVE_NUMBERS,
        "stage3_param_persistence_threshold": SMALL_NUMBERS,
        "reduce_bucket_size": LIVE_NUMBERS,
        # It would replace torch.nn.functional.linear for the whole process.
        "memory_efficient_linear": False,
    }


@contextmanager
def hooks_on(forward: nn.Module, part: nn.Module) -> Iterator[None]:
    """Let `deepspeed.initialize` see `part` as the only child of `forward`, and so hook no other module."""
    forward.children = lambda: iter((part,))  # type: ignore[method-assign]
    try:
        yield
    finally:
        del forward.children


class WholeParameters:
    """Parameters that stay whole on every rank, though their optimizer states are divided.

    Parameters
    ----------
    optimizer : DeepSpeed's, of stage 3.
    """

    def __init__(self, optimizer: Any, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        kept = optimizer.parameter_offload.persistent_parameters
        known = {id(parameter) for parameter in kept}
        for parameter in parameters:
            parameter.ds_persist = True  # type: ignore[attr-defined]
            if id(parameter) not in known:
                # DeepSpeed gathers what is in this list after each step and each checkpoint.
                kept.append(parameter)
        self.gather()

    def gather(self) -> None:
        """Gather those that are not whole: all at the start, none as a rule, all after a step that DeepSpeed gave up."""
        missing = [parameter for parameter in self._parameters if is_divided(parameter)]
        if missing:
            missing[0].all_gather(missing)  # type: ignore[attr-defined]


def forget(forward: nn.Module) -> None:
    """Let a closed engine's model go: DeepSpeed (0.19) keeps it in a list of its own."""
    from deepspeed.runtime.zero import parameter_offload

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not forward]


def rank_state(model: nn.Module, divided: set[str]) -> dict[str, Tensor]:
    """The `state_dict` on the CPU, of the names in `divided` this rank's share only."""
    named = model.state_dict(keep_vars=True)
    return {name: (tensor.ds_tensor if name in divided else tensor).detach().cpu().clone() for name, tensor in named.items()}


def restore_frozen(forward: nn.Module, folder: Path) -> None:
    """Take what the stage does not train from a DeepSpeed checkpoint of any number of ranks; the universal layout lacks it."""
    files = sorted(folder.glob("zero_pp_rank_*_model_states.pt"), key=lambda path: int(path.name.split("_")[3]))
    shares = [torch.load(path, map_location="cpu", weights_only=True, mmap=True)["frozen_param_fragments"] for path in files]
    for name, parameter in forward.named_parameters():
        if parameter.requires_grad:
            continue
        values = torch.cat([share[name].flatten() for share in shares])[: full_shape(parameter).numel()]
        own = parameter.ds_tensor  # type: ignore[attr-defined]
        start = min(world_rank() * own.numel(), values.numel())
        part = values[start : start + own.numel()]
        own.data[: part.numel()].copy_(part)
        if not is_divided(parameter):
            parameter.data.copy_(values.view(full_shape(parameter)))
