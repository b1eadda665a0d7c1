"""Is the best better than the base, or was it lucky, and would learned weights do? Runs with other seeds, and intervals of their means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ssacl.sweeps.ledger import Trial

LEVEL = 0.95
ARMS = {"best": "the best", "uncertainty": "learned weighting"}
"""What is compared with the base -> its words."""


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval of Student's t; no interval for fewer than two values."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2:
        return {"mean": float(array.mean()) if len(array) else None, "interval": None, "values": array.tolist()}
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    mean = float(array.mean())
    return {"mean": mean, "interval": [mean - half, mean + half], "values": array.tolist()}


def compare_runs(runs: Sequence[tuple[Trial, float | None]], arm: str, metric: str, mode: str) -> dict[str, Any]:
    """An arm ("best" or "uncertainty") against the base in one metric (each run with its value), over the seeds that both have trained.

    Returns
    -------
    dict
        `base`, `values` (the arm's) and `difference` (arm minus base, seed by seed) as `mean_interval` gives them, and the `verdict` in
        words.
    """
    by_kind: dict[str, dict[int, float]] = {"base": {}, arm: {}}
    for run, value in runs:
        if run.status == "finished" and run.kind in by_kind and value is not None:
            by_kind[run.kind][run.seed] = value
    seeds = sorted(by_kind["base"].keys() & by_kind[arm].keys())
    base, ours = ([by_kind[kind][seed] for seed in seeds] for kind in ("base", arm))
    difference = mean_interval([own - other for own, other in zip(ours, base, strict=True)])
    return {
        "arm": arm,
        "metric": metric,
        "mode": mode,
        "seeds": seeds,
        "base": mean_interval(base),
        "values": mean_interval(ours),
        "difference": difference,
        "verdict": _verdict(difference, 1 if mode == "max" else -1, ARMS[arm]),
    }


def _verdict(difference: dict[str, Any], sign: int, arm: str) -> str:
    if difference["mean"] is None:
        return "not compared"
    gain = sign * difference["mean"]
    if difference["interval"] is None:
        return "one seed says nothing"
    low, high = sorted(sign * end for end in difference["interval"])
    if low > 0:
        return f"{arm} is better"
    if high < 0:
        return f"{arm} is worse"
    return f"no difference beyond the seeds' spread (on average {'better' if gain > 0 else 'worse' if gain < 0 else 'equal'})"
