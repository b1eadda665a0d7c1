"""Which keys decided: of each, the share of an objective's variation that goes with it, alone and monotonically."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from ssacl.sweeps.config import SweepConfig
from ssacl.sweeps.ledger import Trial

MIN_TRIALS = 4


def importance(config: SweepConfig, trials: Sequence[Trial], metric: str) -> dict[str, float]:
    """Squared rank correlation of each searched key with a metric over the finished trials; a choice's between its values' mean ranks.

    It is a description of few trials, not a model of the space: with fewer than `MIN_TRIALS` there is none.
    """
    pairs = [(trial.point, value) for trial in trials if trial.status == "finished" and (value := trial.value(metric)) is not None]
    if len(pairs) < MIN_TRIALS:
        return {}
    ranks = stats.rankdata([value for _, value in pairs])
    shares = {}
    for key, domain in config.space.items():
        drawn = [point[key] for point, _ in pairs]
        if domain.choice is None:
            own = stats.rankdata(drawn)
        else:
            names = np.array([repr(each) for each in drawn])
            own = np.array([ranks[names == name].mean() for name in names])
        varies = np.ptp(own) > 0 and np.ptp(ranks) > 0
        shares[key] = float(np.corrcoef(own, ranks)[0, 1] ** 2) if varies else 0.0
    return shares
