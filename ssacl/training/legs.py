"""A run with `run.changes` is trained leg by leg: each ends at a checkpoint, and the next goes on from it under its own settings."""

from __future__ import annotations

from dataclasses import dataclass

from ssacl.changes import changed_trees
from ssacl.config import Config, parse_config
from ssacl.training.resume import RunStore, run_storage
from ssacl.training.stages import StagePlan


@dataclass(frozen=True)
class Leg:
    """Optimizer steps under one configuration."""

    config: Config
    """What they are taken under."""
    whole: Config
    """The run's own, with its changes: what its checkpoints are compared with."""
    until_step: int | None = None
    """Steps, over all stages, after which it ends; none: with the run."""

    def last_step(self, plan: StagePlan) -> int:
        """The step of a stage after which this leg ends; the stage's own last where it goes further."""
        return plan.num_steps if self.until_step is None else min(plan.num_steps, max(0, self.until_step - plan.steps_before))


def legs(whole: Config, until_step: int | None = None) -> list[Leg]:
    """The legs of a run, of which none goes beyond `until_step`."""
    parts = [(start, parse_config(tree)) for start, tree in changed_trees(whole.model_dump(mode="json"))]
    parts = [(start, config) for start, config in parts if start == 0 or until_step is None or start < until_step]
    ends = [*(start for start, _ in parts[1:]), until_step]
    return [Leg(config, whole, end) for (_, config), end in zip(parts, ends, strict=True)]


def legs_left(whole: Config, world_rank: int, until_step: int | None = None) -> list[Leg]:
    """Those that the run's newest checkpoint does not stand at the end of, and always the last; called by all ranks together."""
    parts = legs(whole, until_step)
    found = RunStore(run_storage(whole), world_rank).latest() if len(parts) > 1 else None
    reached = 0 if found is None else int(found[1].get("run_step", 0))
    return [leg for leg in parts[:-1] if leg.until_step is None or leg.until_step > reached] + parts[-1:]
