"""The DeepSpeed engine: ZeRO around the same torch AdamW and the same schedule as the plain one."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssacl.config import EngineConfig
from ssacl.distributed import world_rank, world_size
from ssacl.errors import CheckpointError, ConfigError
from ssacl.models.divided import divided_language_model, full_size, is_divided, whole_state
from ssacl.training.engine import AnyBatch, EngineBase, StageForward, Values, make_optimizer, own_group_settings, set_learning_rates
from ssacl.training.host_copies import HostCopies
from ssacl.training.kernels import load_kernels
from ssacl.training.stages import StagePlan
from ssacl.training.universal import convert_checkpoint
from ssacl.training.zero3 import WholeParameters, forget, hooks_on, rank_state, restore_frozen, zero3_settings

_TAG, _ORIGIN = "deepspeed", "deepspeed.json"


@dataclass(frozen=True)
class Origin:
    """How a checkpoint's optimizer state is split; at any other split it is converted first."""

    zero_stage: int
    world_size: int

    def fits(self, other: Origin) -> bool:
        """Without ZeRO every rank holds all of it, so that the number of ranks does not matter."""
        return self == other or self.zero_stage == other.zero_stage == 0


class DeepSpeedEngine(EngineBase):
    """DeepSpeed ZeRO 0-3. Needs a process group, of one rank if need be; in stage 3, a model built inside `construction`."""

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], config: EngineConfig, stage: StagePlan, device: torch.device
    ) -> None:
        super().__init__(config, stage, device)
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(
                "engine.kind deepspeed needs the package deepspeed: pip install 'ssacl[train]', or set engine.kind=torch."
            ) from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self._model, self._zero_stage = model, config.zero_stage
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self.num_trained = sum(full_size(parameter) for parameter in self._parameters)
        # DeepSpeed (0.19) views parameters as bytes, which fails without dimensions: such scalars are vectors of one number in here.
        self._scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
        for name in self._scalars:
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.reshape(1)
        self._forward = StageForward(model, stage.kind, config.precision, device)
        self._divided = {name for name, tensor in model.state_dict(keep_vars=True).items() if is_divided(tensor)}
        whole = [parameter for parameter in model.parameters() if not is_divided(parameter)]
        load_kernels()
        zero3 = config.zero_stage == 3
        assert not zero3 or self._divided, "a model for ZeRO 3 is built inside construction()"
        with hooks_on(self._forward, model.get_submodule("language")) if zero3 else nullcontext():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=self._forward,
                optimizer=make_optimizer(groups, stage),
                config=deepspeed_tree(config, stage.optim.clip_norm),
                dist_init_required=False,
            )
        self._whole = WholeParameters(self._optimizer, whole) if zero3 else None

    def _pass(self, batch: AnyBatch, ramp: float) -> tuple[Tensor, dict[str, Tensor]]:
        if self._whole is not None:
            self._whole.gather()
        passed: tuple[Tensor, dict[str, Tensor]] = self._engine(batch.to(self.device), ramp)
        return passed

    def _step(self, batches: Sequence[AnyBatch], ramp: float) -> Values:
        self._engine.train()
        self.lr = set_learning_rates(self._optimizer, self.stage, self.steps_done)
        sums: list[dict[str, Tensor]] = []
        for index, batch in enumerate(batches):
            total, values = self._pass(batch, ramp)
            self._engine.backward(total)
            sums.append(values)
            if index == len(batches) - 1:
                # Before the weights move: a bad loss leaves them as they were.
                means = self._finish(sums)
                if self._zero_stage == 0:
                    norm = nn.utils.clip_grad_norm_(self._parameters, self.stage.optim.clip_norm or math.inf)
            self._engine.step()
        self.steps_done += 1
        if self._zero_stage > 0:
            norm = self._engine.get_global_grad_norm()
        return {**means, "gradient_norm": float(norm)}

    def _losses(self, batch: AnyBatch, ramp: float) -> dict[str, Tensor]:
        self._engine.eval()
        return self._pass(batch, ramp)[1]

    @property
    def _origin(self) -> Origin:
        return Origin(self._zero_stage, world_size())

    def save(self, folder: Path) -> HostCopies:
        copies = HostCopies()
        writer = self._engine.checkpoint_engine
        # DeepSpeed collects, we write; nor need it make copies of its own.
        writer.save, writer.preserves_storage_sharing = copies.add, lambda: False
        # Nor put scripts beside the states: a full disk must not stop one rank between the barriers of DeepSpeed's saving.
        self._engine._copy_recovery_script = lambda folder: None
        # The version is what the converter to the universal layout asks for.
        client = {"steps_done": self.steps_done, "universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        self._engine.save_checkpoint(str(folder), tag=_TAG, client_state=client, save_latest=False)
        if world_rank() == 0:
            (folder / _ORIGIN).write_text(json.dumps(asdict(self._origin)), encoding="utf-8")
        return copies

    def load(self, folder: Path) -> None:
        try:
            written = Origin(**json.loads((folder / _ORIGIN).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"The checkpoint was not written by the DeepSpeed engine ({_ORIGIN} is missing). Set engine.kind as it was, or start a "
                "new run.name."
            ) from error
        try:
            # In stage 3 DeepSpeed also gives every group of a converted checkpoint the settings of the first.
            with own_group_settings(self._optimizer):
                client = self._load_as_written(folder) if written.fits(self._origin) else self._load_converted(folder, written)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"DeepSpeed cannot take up the checkpoint ({type(error).__name__}), which {written.world_size} train workers wrote with "
                f"engine.zero_stage={written.zero_stage}. Run with those, or start a new run.name."
            ) from error
        self.steps_done = int(client["steps_done"])

    def _load_as_written(self, folder: Path) -> dict[str, Any]:
        client: dict[str, Any] = self._engine.load_checkpoint(str(folder), tag=_TAG)[1]
        return client

    def _load_converted(self, folder: Path, written: Origin) -> dict[str, Any]:
        if written.zero_stage != self._zero_stage and {written.zero_stage, self._zero_stage} != {1, 2}:
            raise CheckpointError(
                f"The checkpoint was written with engine.zero_stage={written.zero_stage}, and goes on with that only: ZeRO 0 keeps the "
                "optimizer whole, 1 and 2 in shards, 3 in other shards. Set it back, or start a new run.name."
            )
        converted = convert_checkpoint(folder / _TAG)
        # First what the stage does not train: the universal layout lacks it.
        if self._whole is None:
            self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_only=True)
        else:
            restore_frozen(self._forward, folder / _TAG)
        settings = self._engine._config
        settings.load_universal_checkpoint = True
        try:
            client: dict[str, Any] = self._engine.load_checkpoint(str(converted.parent), tag=converted.name)[1]
        finally:
            settings.load_universal_checkpoint = False
        if self._whole is not None:
            # And every group one and the same step counter, which each would raise.
            for state in self._optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
        return client

    def full_state(self) -> dict[str, Tensor]:
        return self._unwrapped({name: value.detach().cpu().clone() for name, value in whole_state(self._model).items()})

    def rank_state(self) -> dict[str, Tensor]:
        return self._unwrapped(rank_state(self._model, self._divided))

    def _unwrapped(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.reshape(()) if name in self._scalars else value for name, value in state.items()}

    def close(self) -> None:
        self._engine.destroy()
        if self._whole is not None:
            forget(self._forward)


def construction(config: EngineConfig) -> AbstractContextManager[None]:
    """In which a model for `config` is built: under ZeRO 3 the language model is divided over the ranks as it is made."""
    if config.kind != "deepspeed" or config.zero_stage != 3:
        return nullcontext()
    load_kernels()
    return divided_language_model(deepspeed_tree(config, 0.0))


def deepspeed_tree(config: EngineConfig, clip_norm: float) -> dict[str, Any]:
    """The DeepSpeed configuration that stands for ours."""
    tree: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps,
        # Without ZeRO DeepSpeed clips but keeps the norm to itself; the engine clips there.
        "gradient_clipping": clip_norm if config.zero_stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "zero_optimization": {"stage": config.zero_stage},
    }
    if config.zero_stage == 3:
        tree["zero_optimization"] |= zero3_settings()
    if config.offload == "cpu":
        tree["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return tree
