"""One optimizer step on one or many ranks: plain torch (DDP), or DeepSpeed ZeRO.

Weights are float32 in the module; `bf16` and `fp16` are autocast inside the forward, so that an exported model never loses digits.
Every method is called by all ranks, in the same order.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssacl.config import Config, EngineConfig
from ssacl.data.records import Batch
from ssacl.errors import CheckpointError, TrainingError
from ssacl.models.findings_head import FindingsBatch
from ssacl.training.host_copies import HostCopies
from ssacl.training.precision import resolve_precision
from ssacl.training.stages import StagePlan, select_trainable

logger = logging.getLogger(__name__)

_STATE = "state.pt"
Values = dict[str, float]
AnyBatch: TypeAlias = Batch | FindingsBatch


class Engine(Protocol):
    """What the loop asks for."""

    num_trained: int
    """Numbers (not tensors) that the optimizer changes."""
    lr: float
    """Largest learning rate of the last step."""

    def step(self, batches: Sequence[AnyBatch], ramp: float) -> Values:
        """One optimizer step on `accumulation_steps` micro batches; losses averaged over them and over ranks, and `gradient_norm`.

        Raises
        ------
        TrainingError
            A loss is not finite; the weights are as before the step.
        """

    def evaluate(self, batch: AnyBatch, ramp: float) -> Values:
        """Losses of one micro batch in eval mode, without gradients, averaged over ranks."""

    def save(self, folder: Path) -> HostCopies:
        """Copy this rank's part of the state (weights, optimizer, step); what is given back writes it below `folder`."""

    def load(self, folder: Path) -> None:
        """Take up what was written."""

    def full_state(self) -> dict[str, Tensor]:
        """The model's whole state_dict on the CPU, on every rank; under ZeRO 3 on rank 0, and empty elsewhere."""

    def rank_state(self) -> dict[str, Tensor]:
        """What this rank holds of the state_dict, on the CPU: all of it, under ZeRO 3 its share of the language model (`fill_shares`)."""

    def close(self) -> None:
        """Take hooks off the model and free the optimizer."""


class StageForward(nn.Module):
    """The model in one stage, as one module for DDP and DeepSpeed to hook: `(batch, ramp) -> (total, named losses)`."""

    def __init__(self, model: nn.Module, stage: str, precision: str, device: torch.device) -> None:
        super().__init__()
        self.model, self._stage = model, stage
        self._device_type = device.type
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)

    def forward(self, batch: AnyBatch, ramp: float) -> tuple[Tensor, dict[str, Tensor]]:
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._dtype is not None:
            autocast = torch.autocast(self._device_type, self._dtype)
        with autocast:
            losses = self.model(batch, self._stage, ramp)
        total = losses.total.float()
        return total, {"total": total.detach(), **{name: value.detach().float() for name, value in losses.named().items()}}


def make_engine(model: nn.Module, config: Config, stage: StagePlan, device: torch.device | str = "cpu") -> Engine:
    """Build the engine that `config.engine.kind` names, training what `stage` trains.

    Raises
    ------
    ConfigError
        The precision does not run on this device, or DeepSpeed is not installed.
    """
    from ssacl.training.deepspeed_engine import DeepSpeedEngine

    device = torch.device(device)
    settings = config.engine.model_copy(update={"precision": resolve_precision(config.engine.precision, device)})
    logger.info("stage %s: matrix products in %s", stage.kind, settings.precision)
    groups = parameter_groups(model, stage)
    if settings.compile:
        model.compile_blocks()  # type: ignore[operator]
    if config.engine.kind == "torch":
        with explained_memory(settings):
            return TorchEngine(model, groups, settings, stage, device)
    with explained_memory(settings):
        return DeepSpeedEngine(model, groups, settings, stage, device)


def parameter_groups(model: nn.Module, stage: StagePlan) -> list[dict[str, Any]]:
    """The stage's AdamW groups with their peak learning rate as `peak_lr`; everything else is frozen."""
    groups: list[dict[str, Any]] = model.parameter_groups(stage.optim, stage.kind, stage.freeze_encoder)  # type: ignore[operator]
    select_trainable(model, groups)
    return [{**group, "peak_lr": float(group.get("lr", stage.optim.lr))} for group in groups]


def make_optimizer(groups: list[dict[str, Any]], stage: StagePlan) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=stage.optim.lr, betas=stage.optim.betas, weight_decay=stage.optim.weight_decay, fused=True)


def set_learning_rates(optimizer: Any, stage: StagePlan, step: int) -> float:
    """Set every group's learning rate for `step`; gives the largest."""
    for group in optimizer.param_groups:
        group["lr"] = stage.learning_rate(step, group["peak_lr"])
    return max(float(group["lr"]) for group in optimizer.param_groups)


@contextmanager
def own_group_settings(optimizer: Any) -> Iterator[None]:
    """In which a checkpoint is loaded: of its groups the moments are taken, while rates, decay and betas stay as configured."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def average_over_ranks(values: Mapping[str, Tensor]) -> Values:
    """Means over ranks; every rank gets the same numbers, so that all of them draw the same conclusion."""
    packed = torch.stack([value.detach().double() for value in values.values()])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
    return dict(zip(values, packed.tolist(), strict=True))


def require_finite(values: Values, stage: StagePlan, step: int) -> None:
    """Raise the TrainingError of a loss that is not finite."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        named = [name for name in broken if name != "total"] or broken
        raise TrainingError(
            f"Not finite at step {step} of stage '{stage.kind}': {', '.join(named)}. The last checkpoint is sound: "
            "lower optim.lr, set optim.clip_norm, or use engine.precision=fp32, then run the same command again."
        )


@contextmanager
def explained_memory(config: EngineConfig) -> Iterator[None]:
    """Turn the device's out-of-memory error into a TrainingError that says what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        shard = "" if config.kind == "deepspeed" else "engine.kind=deepspeed, "
        raise TrainingError(
            f"The device ran out of memory with engine.micro_batch_size {config.micro_batch_size}. Lower it (and raise "
            "engine.accumulation_steps to keep the samples per step), set model.activation_checkpointing=true, "
            f"{shard}engine.zero_stage=2 or engine.offload=cpu, or lower data.lm_max_tokens; then run the same command again."
        ) from error


class EngineBase(ABC):
    """What both engines share: the step count, the mean of the micro batches' losses, and the error of a full device."""

    def __init__(self, config: EngineConfig, stage: StagePlan, device: torch.device) -> None:
        self.config, self.stage, self.device, self.steps_done = config, stage, device, 0
        self.lr = 0.0

    def step(self, batches: Sequence[AnyBatch], ramp: float) -> Values:
        """See `Engine.step`."""
        with explained_memory(self.config):
            return self._step(batches, ramp)

    @torch.no_grad()
    def evaluate(self, batch: AnyBatch, ramp: float) -> Values:
        """See `Engine.evaluate`."""
        with explained_memory(self.config):
            return average_over_ranks(self._losses(batch, ramp))

    @abstractmethod
    def full_state(self) -> dict[str, Tensor]: ...

    def rank_state(self) -> dict[str, Tensor]:
        """See `Engine.rank_state`."""
        return self.full_state()

    @abstractmethod
    def _step(self, batches: Sequence[AnyBatch], ramp: float) -> Values: ...

    @abstractmethod
    def _losses(self, batch: AnyBatch, ramp: float) -> dict[str, Tensor]: ...

    def _finish(self, sums: list[dict[str, Tensor]]) -> Values:
        means = {name: torch.stack([values[name] for values in sums]).mean() for name in sums[0]}
        values = average_over_ranks(means)
        require_finite(values, self.stage, self.steps_done)
        return values


class TorchEngine(EngineBase):
    """AdamW on the module itself, or under DDP when there are several ranks."""

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], config: EngineConfig, stage: StagePlan, device: torch.device
    ) -> None:
        super().__init__(config, stage, device)
        self._model = model
        self._forward = StageForward(model, stage.kind, config.precision, device)
        self._ddp: DistributedDataParallel | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._ddp = DistributedDataParallel(self._forward, device_ids=[device.index] if device.type == "cuda" else None)
        self._optimizer = make_optimizer(groups, stage)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self.num_trained = sum(parameter.numel() for parameter in self._parameters)

    def _step(self, batches: Sequence[AnyBatch], ramp: float) -> Values:
        self._model.train()
        module = self._ddp if self._ddp is not None else self._forward
        sums: list[dict[str, Tensor]] = []
        self._optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            # Only the last micro batch needs the reduction: gradients add up before it.
            with self._ddp.no_sync() if self._ddp is not None and not last else nullcontext():
                total, values = module(batch.to(self.device), ramp)
                self._scaler.scale(total / len(batches)).backward()
            sums.append(values)
        means = self._finish(sums)
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self.stage.optim.clip_norm or math.inf)
        if not self._scaler.is_enabled():
            require_finite({"gradient norm": float(norm)}, self.stage, self.steps_done)
        self.lr = set_learning_rates(self._optimizer, self.stage, self.steps_done)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.steps_done += 1
        return {**means, "gradient_norm": float(norm)}

    def _losses(self, batch: AnyBatch, ramp: float) -> dict[str, Tensor]:
        self._model.eval()
        values: dict[str, Tensor] = self._forward(batch.to(self.device), ramp)[1]
        return values

    def save(self, folder: Path) -> HostCopies:
        copies = HostCopies()
        if dist.is_initialized() and dist.get_rank() != 0:
            return copies
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "step": self.steps_done,
        }
        copies.add(state, folder / _STATE)
        return copies

    def load(self, folder: Path) -> None:
        try:
            state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"The checkpoint was not written by the plain torch engine ({_STATE} is missing). Set engine.kind as it was."
            ) from error
        self._model.load_state_dict(state["model"])
        with own_group_settings(self._optimizer):
            self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.steps_done = int(state["step"])

    def full_state(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu() for name, value in self._model.state_dict().items()}

    def close(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._ddp = None
