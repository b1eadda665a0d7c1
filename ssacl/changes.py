"""`run.changes`: settings that a run changes half way. Which ones can, and what the configuration is from a step on."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ssacl.dotted import put, yaml_number

CHANGEABLE = (
    "optim.lr",
    "optim.betas",
    "losses.image_reconstruction",
    "losses.global_contrastive",
    "losses.language_model",
    "losses.anatomy_reconstruction",
    "losses.anatomical_consistency",
    "losses.soft_target",
    "losses.soft_target_share",
    "losses.soft_target_temperature",
    "losses.mask_ratio",
    "losses.grounding.equivariance",
    "losses.grounding.centroid",
    "losses.grounding.slots",
    "losses.grounding.compactness",
    "losses.grounding.order",
    "losses.grounding.layout_chart",
    "losses.grounding.pose_range",
    "losses.grounding.mean_layout",
    "losses.grounding.shape",
    "losses.grounding.hierarchy",
)
"""What every step reads anew, and what has no part in the shapes of weights, optimizer and batches."""
_REASONS = {
    "losses.initial_tau": "it is where a learned weight starts, and is not read again",
    "losses.balance": "it adds learned weights that an optimizer under way lacks",
    "losses.normalised_pixels": "it changes what the pixel decoder's output means",
    "losses.recursive_anatomy": "it changes how the model is wired",
    "losses.grounding.enabled": "it changes what the model is made of",
    "losses.grounding.ramp_share": "the ramp counts from the stage's first step",
    "losses.grounding.region_text": "whether it is above 0 decides what the optimizer holds",
    "losses.grounding.entities": "whether it is above 0 decides what the optimizer holds",
    "optim.lm_lr_scale": "it divides the optimizer's parameters into groups",
    "optim.weight_decay": "it divides the optimizer's parameters into groups",
    "optim.warmup_share": "the schedule counts from the stage's first step",
    "optim.clip_norm": "DeepSpeed takes it from its checkpoint",
    "model": "it decides what the model is made of",
    "data": "it decides which samples come, and as what",
    "engine": "it decides how a checkpoint is divided",
    "run": "it says what the run is",
}
_WHO = "run.changes"


def why_fixed(key: str) -> str:
    """Why a run cannot change a key half way; "" if it can."""
    if key in CHANGEABLE:
        return ""
    return _REASONS.get(key) or _REASONS.get(key.partition(".")[0]) or "it is no key that every step reads anew"


class Change(BaseModel):
    """From a step on, some settings have other values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after_steps: int = Field(ge=1, description="Optimizer steps, over all stages, that are done when it comes.")
    values: dict[str, Any] = Field(min_length=1, description="Dotted key -> value from then on.")

    @field_validator("values")
    @classmethod
    def _can_change(cls, values: dict[str, Any]) -> dict[str, Any]:
        for key in values:
            if reason := why_fixed(key):
                raise ValueError(f"'{key}' cannot change half way: {reason}. Keys that can: {', '.join(CHANGEABLE)}")
        return {key: yaml_number(value) for key, value in values.items()}


def ascending(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """
    Raises
    ------
    ValueError
        They are not in the order of their steps, each at its own.
    """
    steps = [change.after_steps for change in changes]
    if steps != sorted(set(steps)):
        raise ValueError(f"changes come after ascending numbers of steps, not {steps}")
    return changes


def changed_trees(tree: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(optimizer steps done before, plain configuration tree from then on, without changes): the start, then after each change."""
    tree = deepcopy(tree)
    changes, tree["run"]["changes"] = tree["run"]["changes"], []
    yield 0, deepcopy(tree)
    for change in changes:
        for key, value in change["values"].items():
            put(tree, key, value, _WHO)
        yield change["after_steps"], deepcopy(tree)
