"""Which trials no other beats in every objective, and which of those is called the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ssacl.sweeps.ledger import Trial


def pareto_front(trials: Sequence[Trial], objectives: Mapping[str, str]) -> list[Trial]:
    """Finished trials that no other finished trial equals or beats in every objective and beats in one; in their order."""
    complete = [trial for trial in trials if trial.status == "finished" and all(trial.value(name) is not None for name in objectives)]
    if not complete:
        return []
    gains = _gains(complete, objectives)
    return [
        trial
        for trial, own in zip(complete, gains, strict=True)
        if not any((other >= own).all() and (other > own).any() for other in gains)
    ]


def best_trial(trials: Sequence[Trial], objectives: Mapping[str, str]) -> Trial | None:
    """The one of the front that is highest on average, each objective scaled to 0..1 over all finished trials; the first of equals."""
    front = pareto_front(trials, objectives)
    if not front:
        return None
    complete = [trial for trial in trials if trial.status == "finished" and all(trial.value(name) is not None for name in objectives)]
    gains = _gains(complete, objectives)
    low, span = gains.min(axis=0), np.ptp(gains, axis=0)
    scaled = (_gains(front, objectives) - low) / np.where(span > 0, span, 1.0)
    return front[int(scaled.mean(axis=1).argmax())]


def best_so_far(trials: Sequence[Trial], metric: str, mode: str) -> list[tuple[int, float]]:
    """(optimizer steps spent by all trials up to here, best value so far) after each trial, in the order of their numbers."""
    curve, spent, best = [], 0, None
    for trial in trials:
        spent += trial.step - trial.forked_at
        value = trial.value(metric) if trial.status == "finished" else None
        if value is not None:
            best = value if best is None else (max if mode == "max" else min)(best, value)
        if best is not None:
            curve.append((spent, best))
    return curve


def _gains(trials: Sequence[Trial], objectives: Mapping[str, str]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """[trials, objectives], higher is better."""
    return np.array([[(trial.value(name) or 0.0) * (1 if mode == "max" else -1) for name, mode in objectives.items()] for trial in trials])
