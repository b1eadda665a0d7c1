"""A language model whose weights are divided over the ranks (ZeRO 3) from its construction on.

A divided weight is whole on a rank only while it is made, used, read or written, one module's at a time; between, the rank holds its share
(`ds_tensor`, flat, padded to equal lengths) and `parameter.data` is empty. Its shape is then `full_shape`. The functions here take ordinary
models as well, for which they do what torch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ssacl.distributed import world_rank

Model = TypeVar("Model", bound=nn.Module)


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter, wherever its numbers lie."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def full_size(parameter: Tensor) -> int:
    """Numbers in the whole parameter."""
    return full_shape(parameter).numel()


def is_divided(parameter: Tensor) -> bool:
    """Whether this rank has no more than its share of the parameter just now."""
    status = getattr(parameter, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"


@contextmanager
def divided_language_model(tree: Mapping[str, Any]) -> Iterator[None]:
    """Let a language model that is built inside (`build_language_model`, `from_pretrained`) be divided over all ranks.

    Parameters
    ----------
    tree : the DeepSpeed configuration, of ZeRO stage 3.
    """
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    deepspeed.init_distributed(dist_init_required=False)
    # transformers finds it by a weak reference, as long as it lives.
    asked = HfDeepSpeedConfig(dict(tree))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del asked


def build_language_model(build: Callable[[], Any]) -> Any:
    """`build()`, a transformers model with random weights; inside `divided_language_model` divided, and of the same numbers."""
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return build()
    import deepspeed

    # No overrides: weights are drawn on the CPU, where an ordinary model draws them.
    with _gathered_initialisation(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config(), tensor_overrides=[]):
        return build()


@contextmanager
def whole(parameters: Iterable[Tensor], write: bool = False) -> Iterator[None]:
    """Inside, `parameters` are whole on every rank; with `write`, what rank 0 made of them is kept. Called by all ranks."""
    parts = [parameter for parameter in parameters if is_divided(parameter)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if write else None):
        yield


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict`; of a divided model on rank 0 alone, copied to the CPU, and empty elsewhere. Called by all ranks."""
    named = model.state_dict(keep_vars=True)
    if not any(is_divided(tensor) for tensor in named.values()):
        return {name: tensor.detach() for name, tensor in named.items()}
    state: dict[str, Tensor] = {}
    for name, tensor in named.items():
        with whole([tensor]):
            if world_rank() == 0:
                state[name] = tensor.detach().cpu().clone()
    return state


def fill_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors`, the same on every rank, into the parameters and buffers of their names. Called by all ranks."""
    named = model.state_dict(keep_vars=True)
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if not is_divided(named[name])}, strict=False)
    for name, tensor in tensors.items():
        if is_divided(named[name]):
            with whole([named[name]], write=True), torch.no_grad():
                named[name].copy_(tensor)


def fill_shares(model: Model, shares: Mapping[str, Tensor]) -> Model:
    """Copy this rank's `shares` (`Engine.rank_state`) into `model`, which is divided in the same way, and give it back."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        (tensor.ds_tensor if is_divided(tensor) else tensor).data.copy_(shares[name])
    return model


@contextmanager
def _gathered_initialisation() -> Iterator[None]:
    """Let transformers fill weights that are divided already: it would see empty tensors.

    Every rank draws the same numbers, and in the order of an ordinary construction.
    """
    from transformers import PreTrainedModel
    from transformers.initialization import guard_torch_init_functions

    def fill(module: nn.Module, initialise: Callable[..., None], is_custom: bool) -> None:
        for child in module.children():
            fill(child, child._initialize_weights if isinstance(child, PreTrainedModel) else initialise, is_custom)
        if getattr(module, "_is_hf_initialized", False):
            return
        # A module may fill its children's weights once more.
        owners = [module, *(child for child in module.children() if not isinstance(child, PreTrainedModel))]
        parameters = [parameter for owner in owners for parameter in owner.parameters(recurse=False)]
        with whole(parameters, write=True):
            devices = [parameter.device for parameter in parameters]
            for parameter in parameters:
                parameter.data = parameter.data.cpu()
            initialise(module, is_custom)
            for parameter, device in zip(parameters, devices, strict=True):
                parameter.data = parameter.data.to(device)

    def initialize_weights(model: Any) -> None:
        with torch.no_grad(), guard_torch_init_functions():
            fill(model, model._initialize_weights, model.is_custom_code())

    plain = PreTrainedModel.initialize_weights
    PreTrainedModel.initialize_weights = initialize_weights
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = plain
