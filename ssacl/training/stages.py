"""What each stage trains, for how long, and how fast: pure functions of the configuration and the step.

contrastive  the encoder, by image reconstruction, contrast, anatomy reconstruction, anatomical consistency, grounding
text         the language model, on prompts and reports without films: cheap, and it learns to follow the prompt
generation   the language side (and the encoder, unless frozen), by the report's cross-entropy
joint        all five losses at once, as in the release
findings     the 14-way head on the frozen encoder
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ssacl.config import Config, OptimConfig
from ssacl.errors import ConfigError

WARMUP_START_LR = 1e-6
"""Learning rate of step 0 of the warm-up (the release's recipe)."""


@dataclass(frozen=True)
class StagePlan:
    """One stage, resolved: counts are optimizer steps."""

    index: int
    steps_before: int
    """Of the stages before."""
    kind: str
    num_steps: int
    warmup_steps: int
    ramp_steps: int
    optim: OptimConfig
    freeze_encoder: bool = False

    @property
    def name(self) -> str:
        return f"{self.index:02d}-{self.kind}"

    def ramp(self, step: int) -> float:
        """Factor 0..1 of the geometric grounding terms at `step`."""
        return 1.0 if self.ramp_steps == 0 else min(1.0, step / self.ramp_steps)

    def learning_rate(self, step: int, peak: float) -> float:
        """Learning rate of optimizer step `step` (0-based): linear from 1e-6 to `peak`, then a cosine to 0 after the last step."""
        if step < self.warmup_steps:
            start = min(WARMUP_START_LR, peak)
            return start + (peak - start) * step / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return 0.5 * peak * (1.0 + math.cos(math.pi * min(1.0, share)))


def fit_batch(config: Config, world_size: int) -> Config:
    """`config` with the micro batch size that gives `engine.global_batch_size` on `world_size` ranks; as it is where that is 0.

    Raises
    ------
    ConfigError
        The samples of a step cannot be dealt out evenly.
    """
    engine = config.engine
    if engine.global_batch_size == 0:
        return config
    parts = world_size * engine.accumulation_steps
    if engine.global_batch_size % parts:
        nearest = engine.global_batch_size // parts * parts or parts
        raise ConfigError(
            f"engine.global_batch_size {engine.global_batch_size} cannot be dealt out evenly: {world_size} train workers times "
            f"engine.accumulation_steps {engine.accumulation_steps} are {parts} parts. Set it to {nearest}, or change one of the two."
        )
    return config.model_copy(update={"engine": engine.model_copy(update={"micro_batch_size": engine.global_batch_size // parts})})


def plan_stages(config: Config, micro_batches_per_epoch: int) -> tuple[StagePlan, ...]:
    """Resolve `config.run.stages`; epochs become optimizer steps.

    Parameters
    ----------
    micro_batches_per_epoch : what each rank's loader gives in one epoch.

    Raises
    ------
    ConfigError
        An epoch holds fewer micro batches than `engine.accumulation_steps`, or words that need findings come before them.
    """
    require_findings_first(config)
    steps_per_epoch = micro_batches_per_epoch / config.engine.accumulation_steps
    if steps_per_epoch < 1:
        raise ConfigError(
            f"One epoch gives {micro_batches_per_epoch} micro batches per rank, fewer than engine.accumulation_steps "
            f"{config.engine.accumulation_steps}. Lower engine.accumulation_steps or engine.micro_batch_size."
        )
    plans: list[StagePlan] = []
    for index, stage in enumerate(config.run.stages):
        num_steps = stage.num_steps or max(1, round(stage.num_epochs * steps_per_epoch))
        grounding = config.losses.grounding
        optim = config.optim if stage.lr is None else config.optim.model_copy(update={"lr": stage.lr})
        plans.append(
            StagePlan(
                index=index,
                steps_before=plans[-1].steps_before + plans[-1].num_steps if plans else 0,
                kind=stage.kind,
                num_steps=num_steps,
                warmup_steps=round(config.optim.warmup_share * num_steps),
                ramp_steps=round(grounding.ramp_share * num_steps) if grounding.enabled and stage.kind in ("contrastive", "joint") else 0,
                optim=optim,
                freeze_encoder=stage.freeze_encoder,
            )
        )
    return tuple(plans)


def steps_done(plans: Sequence[StagePlan], stage_index: int, step: int) -> int:
    """Optimizer steps over all stages, at `step` of a stage, or after the last one."""
    return sum(plan.num_steps for plan in plans[:stage_index]) + step


def require_findings_first(config: Config) -> None:
    """Where leaf slots say what the findings head sees, the head must be trained, and must see the same ever after.

    Raises
    ------
    ConfigError
        Words that need findings come before them.
    """
    known = bool(config.run.init_from)
    for stage in config.run.stages if config.model.findings_in_prefix and config.model.wiring == "paper" else ():
        if stage.kind in ("generation", "joint") and not (known and stage.freeze_encoder and stage.kind == "generation"):
            raise ConfigError(
                f"model.findings_in_prefix needs a trained findings head before stage '{stage.kind}': in run.stages, put 'findings' before "
                "a 'generation' with freeze_encoder: true, or set model.findings_in_prefix=false."
            )
        known = known or stage.kind == "findings"


def select_trainable(model: nn.Module, groups: Sequence[dict[str, Any]]) -> int:
    """Let exactly the parameters in `groups` take gradients; gives how many numbers they hold.

    A frozen parameter must not require gradients: data-parallel reduction would wait for it for ever.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    count = 0
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
            count += parameter.numel()
    return count
