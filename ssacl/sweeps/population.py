"""Population-based training (Jaderberg et al., arXiv 1711.09846) on the ledger: who is replaced, by a copy of whom, with which settings.

All members train to the same number of optimizer steps and wait there, each with a checkpoint. When the last has come, those in the
bottom quantile are stopped, and in the place of each a new trial begins as a copy of one of the best, under settings that are that one's,
moved or drawn anew. A generation is a function of the ledger and the seed, and is written before it is carried out, once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ssacl.sweeps.config import DEFAULT_TRIAL, SweepConfig
from ssacl.sweeps.ledger import Fork, Generation, Ledger, Past, Trial
from ssacl.training.forks import fork_run

logger = logging.getLogger(__name__)


def next_member(ledger: Ledger, live: set[str], start: Callable[[Sequence[Trial]], Trial]) -> Trial | None:
    """The next trial that is to train, up to its `leg_end`; none while others have to come first, or when all are done.

    Parameters
    ----------
    live : names of trials that train now; a generation is decided when there are none.
    start : gives a new trial of the first population, after those that there are.
    """
    config, trials, generations = ledger.sweep.config, ledger.trials(), ledger.generations()
    if generations:
        _carry_out(ledger, generations[-1], trials)
        trials = ledger.trials()
    population = members(trials, generations)
    for trial in population:
        if trial.status == "running" and trial.name not in live and trial.paused_at <= _interval(config) * len(generations):
            return trial
    if not generations and len(trials) < config.scheduler.population:
        return start(trials)
    if live or not any(trial.status == "running" for trial in population):
        return None
    generation = decide(config, population, len(generations) + 1, len(trials))
    ledger.write_generation(generation)
    return next_member(ledger, live, start)


def leg_end(config: SweepConfig, trial: Trial) -> int | None:
    """Optimizer steps, over all stages, at which a trial waits for the others; none: it trains to its end."""
    return trial.paused_at + _interval(config) if config.scheduler.kind == "pbt" and trial.kind == "search" else None


def members(trials: Sequence[Trial], generations: Sequence[Generation]) -> list[Trial]:
    """The trials that none has replaced; those that failed are members until one does."""
    replaced = {fork.replaces for generation in generations for fork in generation.forks}
    return [trial for trial in trials if trial.name not in replaced and trial.status != "pruned"]


def decide(config: SweepConfig, population: Sequence[Trial], number: int, num_trials: int) -> Generation:
    """Generation `number` (from 1) of a population whose members all wait; equal inputs give equal generations.

    The base is never replaced, nobody by one that is no better, and nobody once the budget's trials are used up.
    """
    step, (metric, mode) = number * _interval(config), config.rung
    scores = {trial.name: trial.value(metric) if trial.status == "running" else None for trial in population}
    gains = {name: _gain(score, mode) for name, score in scores.items()}
    worst_first = sorted(population, key=lambda trial: (gains[trial.name], -trial.number))
    size = min(math.ceil(config.scheduler.quantile * len(population)), len(population) // 2)
    losers = [trial for trial in worst_first[:size] if trial.name != DEFAULT_TRIAL]
    forks: list[Fork] = []
    for loser in losers[: max(0, config.budget.trials - num_trials)]:
        better = [trial for trial in worst_first[len(worst_first) - size :] if gains[trial.name] > gains[loser.name]]
        if better:
            rng = np.random.default_rng([config.seed, number, len(forks)])
            parent = better[int(rng.integers(len(better)))]
            name = f"trial-{num_trials + len(forks):04d}"
            forks.append(Fork(name=name, parent=parent.name, replaces=loser.name, point=explore(config, parent.point, rng)))
    return Generation(step=step, scores=scores, forks=forks)


def explore(config: SweepConfig, point: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A copy's settings: each value of `point` moved, or drawn anew with probability `scheduler.redraw`, or where a choice lacks it."""
    found = {}
    for key in sorted(config.space):
        domain, (anew, up, share) = config.space[key], rng.random(3)
        drawn = anew < config.scheduler.redraw or (domain.choice is not None and not domain.contains(point[key]))
        found[key] = domain.at(float(share)) if drawn else domain.moved(point[key], bool(up < 0.5))
    return {key: found[key] for key in config.space}


def _carry_out(ledger: Ledger, generation: Generation, trials: Sequence[Trial]) -> None:
    """What of a generation is not done yet: first copies, then the end of those that they replace."""
    known = {trial.name: trial for trial in trials}
    for fork in generation.forks:
        parent, loser = known[fork.parent], known[fork.replaces]
        if fork.name not in known:
            fork_run(ledger.run(parent.name), ledger.run(fork.name), generation.step)
            past = [*parent.past, Past(name=parent.name, point=parent.point, until_step=generation.step)]
            curve = [record for record in parent.curve if record["step"] <= generation.step]
            ledger.write(Trial(name=fork.name, point=fork.point, seed=parent.seed, curve=curve, past=past, paused_at=generation.step))
            logger.info("after %d steps %s, a copy of %s, takes the place of %s", generation.step, fork.name, parent.name, loser.name)
    for fork in generation.forks:
        loser = known[fork.replaces]
        if loser.status == "running":
            ledger.write(loser.model_copy(update={"status": "pruned", "error": f"replaced by {fork.name}, a copy of {fork.parent}"}))


def _interval(config: SweepConfig) -> int:
    return config.scheduler.first_rung_steps


def _gain(score: float | None, mode: str) -> float:
    """Higher is better."""
    return -math.inf if score is None or not math.isfinite(score) else score if mode == "max" else -score
