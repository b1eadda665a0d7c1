"""Which values to try next: a function of the space and of what the trials so far gave, so that a search goes on from its ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ssacl.sweeps.config import SweepConfig
from ssacl.sweeps.ledger import Trial
from ssacl.sweeps.space import Domain

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


def propose(config: SweepConfig, trials: Sequence[Trial], number: int) -> dict[str, Any]:
    """The point of trial `number`, given those before it; equal inputs give equal points.

    Parameters
    ----------
    trials
        The search's trials. Pruned ones count with their last values, and as the worst so far in what they did not reach; running and
        failed ones do not count.
    """
    import optuna
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    sampler: optuna.samplers.BaseSampler
    if config.searcher.kind == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    else:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=config.searcher.num_random)
    directions = [StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE for mode in config.objectives.values()]
    study = optuna.create_study(directions=directions, sampler=sampler)
    distributions = {key: _distribution(domain) for key, domain in config.space.items()}
    study.add_trials(_known(config, trials, distributions))
    asked = study.ask(distributions)
    return {key: _value(domain, asked.params[key]) for key, domain in config.space.items()}


def _distribution(domain: Domain) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if domain.choice is not None:
        # By number: values may be lists, which Optuna does not take.
        return CategoricalDistribution(list(range(len(domain.choice))))
    low, high = domain.ends
    return FloatDistribution(low, high, log=domain.log_uniform is not None)


def _value(domain: Domain, drawn: Any) -> Any:
    return drawn if domain.choice is None else domain.choice[drawn]


def _known(config: SweepConfig, trials: Sequence[Trial], distributions: Mapping[str, BaseDistribution]) -> list[FrozenTrial]:
    from optuna.trial import create_trial

    over = [trial for trial in trials if trial.status in ("finished", "pruned")]
    worst = {}
    for name, mode in config.objectives.items():
        values = [value for trial in over if (value := trial.value(name)) is not None]
        worst[name] = (min if mode == "max" else max)(values, default=None)
    known = []
    for trial in over:
        inside = all(key in trial.point and domain.contains(trial.point[key]) for key, domain in config.space.items())
        reached = [worst[name] if (value := trial.value(name)) is None else value for name in config.objectives]
        values = [value for value in reached if value is not None]
        # The base may lie outside of the space, and so early nothing may be known of an objective.
        if inside and len(values) == len(reached):
            params = {
                key: domain.choice.index(trial.point[key]) if domain.choice is not None else trial.point[key]
                for key, domain in config.space.items()
            }
            known.append(create_trial(params=params, distributions=dict(distributions), values=values))
    return known
