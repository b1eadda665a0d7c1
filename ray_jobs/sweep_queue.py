"""Between Ray Tune and the ledger: which trial starts next, what is written down of it, and which one is stopped at a rung.

Tune's own state is never read back. A trial is written down before it starts, each of its validations when Tune has decided on it, and its
end before the next one is chosen; so the ledger alone says how a sweep goes on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search import Searcher

from ssacl.data.lease import BusyError, hold_lease, is_free
from ssacl.errors import ConfigError, SSACLError, TrainingError
from ssacl.sweeps.config import DEFAULT_TRIAL, Sweep
from ssacl.sweeps.front import pareto_front
from ssacl.sweeps.ledger import CHECKS, Ledger, Trial
from ssacl.training.loop import HOLDER as RUN_HOLDER

logger = logging.getLogger(__name__)

MANY_FAILURES = 3
"""Trials that fail before any other end: the sweep then stops."""
_NO_LIMIT = 10**9


class TrialQueue(Searcher):
    """Hands out trials and keeps their records.

    Parameters
    ----------
    choose : gives the next trial, or none when there is no more before one that runs has ended; called with the names of those that run.
    at_once : trials that may run at a time.
    is_spent : whether the budget is used up; nothing more is started then, and what runs is stopped.
    """

    def __init__(self, ledger: Ledger, choose: Callable[[set[str]], Trial | None], at_once: int, is_spent: Callable[[], str]) -> None:
        super().__init__()
        self._ledger, self._choose, self._at_once, self._is_spent = ledger, choose, at_once, is_spent
        self._live: dict[str, Trial] = {}
        self._heard: dict[str, float] = {}
        self._paused: set[str] = set()
        self._is_idle = False
        self.failure: SSACLError | None = None
        self.spent = ""

    @property
    def has_more(self) -> bool:
        """Whether there is a trial to start or to go on with; asked while none runs."""
        self.spent = self.spent or self._is_spent()
        return not self.spent and self._choose(set()) is not None

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see above."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        self.spent = self.spent or self._is_spent()
        if self.failure is not None or self.spent:
            return Searcher.FINISHED
        if len(self._live) >= self._at_once or self._is_idle:
            return None
        try:
            trial = self._choose({trial.name for trial in self._live.values()})
        except SSACLError as error:
            self.failure = error
            return Searcher.FINISHED
        if trial is None:
            # Asked again once one of those that run has ended: the ledger is not read many times a second.
            self._is_idle = bool(self._live)
            return None if self._live else Searcher.FINISHED
        self._ledger.write(trial)
        self._live[trial_id], self._heard[trial_id] = trial, time.monotonic()
        logger.info("%s starts%s", trial.name, f" again after {trial.step} steps" if trial.curve else f": {_told(trial.point)}")
        return {"name": trial.name}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        trial = self._live[trial_id]
        now = time.monotonic()
        trial.busy_s += now - self._heard[trial_id]
        self._heard[trial_id] = now
        if result["event"] == "validation":
            record = json.loads(result["record"])
            trial.curve += [record] if record["step"] > trial.step else []
        elif result["event"] == "paused":
            trial.paused_at = result["step"]
            self._paused.add(trial_id)
        elif result["event"] == "failed":
            trial.status, trial.error = "failed", result["error"]
        elif result["event"] == "end":
            trial.status, trial.test = "finished", json.loads(result["test"])
            for last in trial.curve[-1:]:
                last.update(json.loads(result["masks"]))
        self._ledger.write(trial)
        self.spent = self.spent or self._is_spent()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:
            # Tune tells a searcher nothing else of the result for which a trial is stopped.
            self.on_trial_result(trial_id, result)
        trial, paused, self._is_idle = self._live.pop(trial_id), trial_id in self._paused, False
        trial.busy_s += time.monotonic() - self._heard.pop(trial_id)
        if error:
            trial.status, trial.error = "failed", "its process was lost too often; look into Ray's logs (ray logs)"
        elif trial.status == "running" and not paused:
            trial.status, trial.error = "pruned", self.spent
        self._ledger.write(trial)
        metrics = (*self._ledger.sweep.config.objectives, self._ledger.sweep.config.rung[0])
        values = ", ".join(f"{name} {value:.3f}" for name in dict.fromkeys(metrics) if (value := trial.value(name)) is not None)
        status = "waits" if paused else trial.status
        logger.info("%s %s after %d steps: %s", trial.name, status, trial.step, trial.error or values or "no validation")
        if trial.kind == "search":
            self.failure = self.failure or find_failure(self._ledger.sweep, self._ledger.trials())
        drop_losers(self._ledger)


class Rungs(FIFOScheduler):  # type: ignore[misc]
    """Ray's ASHA on optimizer steps, its rungs filled again from the ledger; and the end of all trials when the budget is spent."""

    def __init__(self, ledger: Ledger, queue: TrialQueue) -> None:
        super().__init__()
        config = ledger.sweep.config
        self._queue, (self._metric, mode) = queue, config.rung
        self._asha = AsyncHyperBandScheduler(
            time_attr="step",
            metric=self._metric,
            mode=mode,
            max_t=_NO_LIMIT,
            grace_period=config.scheduler.first_rung_steps,
            reduction_factor=config.scheduler.factor,
        )
        self._is_on = config.scheduler.kind == "asha"
        self._known: set[str] = set()
        for trial in ledger.trials():
            for record in trial.curve:
                self._decide(trial.name, record)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if self._queue.failure is not None or self._queue.spent:
            return str(self.STOP)
        if result["event"] != "validation":
            return str(self.CONTINUE)
        return self._decide(trial.config["name"], json.loads(result["record"]))

    def _decide(self, name: str, record: dict[str, Any]) -> str:
        stub = SimpleNamespace(trial_id=name)
        if name not in self._known:
            self._known.add(name)
            self._asha.on_trial_add(None, stub)
        decision = str(self._asha.on_trial_result(None, stub, record))
        # A trial that has trained to its end has nothing left to save.
        return decision if self._is_on and name != DEFAULT_TRIAL and not record["last"] else str(self.CONTINUE)


def find_failure(sweep: Sweep, trials: list[Trial]) -> SSACLError | None:
    """Why the search cannot come to anything: all trials fail, or what it is to look at is never told."""
    failed = [trial for trial in trials if trial.status == "failed"]
    finished = [trial for trial in trials if trial.status == "finished"]
    if len(failed) >= min(MANY_FAILURES, sweep.config.budget.trials) and not any(trial.came_through for trial in trials):
        return TrainingError(
            f"All {len(failed)} trials failed. The first, {failed[0].name}: {failed[0].error} "
            "Mend that, then run the same command again: they are tried once more."
        )
    if finished:
        wanted = [*sweep.config.objectives, *([sweep.config.rung[0]] if sweep.config.scheduler.kind != "none" else [])]
        never = [name for name in wanted if all(trial.value(name) is None for trial in finished)]
        if never:
            there = sorted({name for trial in finished for record in trial.curve for name in record} - {"step", "stage", "last"})
            return ConfigError(
                f"No trial reports '{never[0]}', which the sweep is to look at. Validations here hold: {', '.join(there)}. "
                "Name one of these, in a sweep of another name."
            )
    return None


def drop_losers(ledger: Ledger, patient: bool = False) -> None:
    """Delete the checkpoints of all ended trials, and the models of those that some other beats.

    A run whose processes are just being stopped keeps its own until the next call; `patient` waits for them.
    """
    trials = ledger.trials()
    kept = {trial.name for trial in pareto_front(trials, ledger.sweep.config.objectives)}
    for trial in trials + ledger.trials(*CHECKS):
        if trial.status == "running":
            continue
        keep_model = trial.name in kept or (trial.kind != "search" and trial.status == "finished")
        run = ledger.storage.sub(f"runs/{trial.name}")
        if not run.list("checkpoints/") and (keep_model or not run.list("model/")):
            continue
        if not patient and not is_free(run, RUN_HOLDER):
            continue
        try:
            with hold_lease(run, RUN_HOLDER):
                ledger.drop_run(trial, keep_model)
        except BusyError:
            logger.warning("the checkpoints of %s stay: something still writes there", trial.name)


def _told(point: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in point.items())
