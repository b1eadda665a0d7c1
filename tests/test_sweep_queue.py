"""What Ray Tune asks of a sweep's queue and rungs, asked without Ray running."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher
from sweep_files import sweep_tree

from ray_jobs.sweep_queue import Rungs, TrialQueue
from ssacl.config import Config
from ssacl.errors import ConfigError, TrainingError
from ssacl.sweeps.config import SweepConfig, checked_sweep
from ssacl.sweeps.ledger import Ledger, Trial


def make_ledger(folder: Path, **changes: Any) -> Ledger:
    return Ledger(checked_sweep(SweepConfig.model_validate(sweep_tree(folder) | {"base": {}} | changes), Config()))


class Tune:
    """Plays Ray Tune: starts trials, passes on what they tell, and hears what becomes of them."""

    def __init__(self, ledger: Ledger, num_trials: int = 6, at_once: int = 2, spent: str = "") -> None:
        self.ledger, self.budget, self.num_started = ledger, spent, 0
        self.queue = TrialQueue(ledger, lambda live: self._choose(live, num_trials), at_once, lambda: self.budget)
        self.rungs = Rungs(ledger, self.queue)
        self._last: dict[str, dict[str, Any]] = {}

    def _choose(self, live: set[str], num_trials: int) -> Trial | None:
        trials = self.ledger.trials()
        left = [trial for trial in trials if trial.status == "running" and trial.name not in live]
        if left:
            return left[0]
        return Trial(name=f"trial-{len(trials):04d}", seed=0) if len(trials) < num_trials else None

    def start(self) -> str:
        self.num_started += 1
        given = self.queue.suggest(f"id-{self.num_started}")
        assert isinstance(given, dict), given
        return str(given["name"])

    def tell(self, name: str, step: int, agreement: float, last: bool = False) -> str:
        figures = {"mirror_agreement": agreement, "findings_f1": agreement} if last else {"mirror_agreement": agreement}
        record = {"step": step, "stage": "joint", "last": last, **figures}
        return self._result(name, {"event": "validation", "record": json.dumps(record)})

    def end(self, name: str, error: str = "") -> None:
        self._result(
            name, {"event": "failed", "error": error} if error else {"event": "end", "masks": '{"anatomy_pointing": 0.5}', "test": "{}"}
        )
        self.stop(name)

    def stop(self, name: str, lost: bool = False) -> None:
        self.queue.on_trial_complete(self._id(name), None if lost else self._last.get(name), error=lost)

    def _result(self, name: str, result: dict[str, Any]) -> str:
        self._last[name] = result
        decision = self.rungs.on_trial_result(None, SimpleNamespace(config={"name": name}), result)
        # As Ray Tune does: a searcher is not told of the result for which a trial is stopped.
        if decision != "STOP":
            self.queue.on_trial_result(self._id(name), result)
        return decision

    def _id(self, name: str) -> str:
        return next(key for key, trial in self.queue._live.items() if trial.name == name)


def test_a_trial_below_its_rung_is_pruned_and_the_base_never(tmp_path: Path) -> None:
    tune = Tune(make_ledger(tmp_path), at_once=3)
    base, good, bad = tune.start(), tune.start(), tune.start()
    assert tune.queue.suggest("one too many") is None
    assert tune.tell(good, 2, 0.9) == "CONTINUE"
    assert tune.tell(base, 2, 0.1) == "CONTINUE"
    assert tune.tell(bad, 2, 0.2) == "STOP"
    tune.stop(bad)
    assert tune.ledger.read(bad).status == "pruned"
    assert tune.ledger.read(bad).step == 2, "what it was stopped for is known"
    assert tune.tell(good, 8, 0.1, last=True) == "CONTINUE", "it has nothing left to save"
    tune.end(good)
    assert tune.ledger.read(good).status == "finished"
    assert [record["step"] for record in tune.ledger.read(good).curve] == [2, 8]
    assert tune.ledger.read(good).value("anatomy_pointing") == 0.5


def test_a_driver_that_is_killed_goes_on_with_the_same_rungs_and_trials(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    before = Tune(ledger)
    base, good = before.start(), before.start()
    before.tell(base, 2, 0.5)
    before.tell(good, 2, 0.9)
    before.tell(base, 8, 0.5, last=True)
    before.end(base)
    third = before.start()
    # Nobody says goodbye: what follows knows the ledger alone.
    after = Tune(make_ledger(tmp_path))
    assert {after.start(), after.start()} == {good, third}
    assert after.tell(good, 2, 0.9) == "CONTINUE"
    assert [record["step"] for record in ledger.read(good).curve] == [2], "what was told is not told twice"
    assert after.tell(third, 2, 0.4) == "STOP", "the rung knows the trials from before"
    after.stop(third)
    assert [trial.status for trial in ledger.trials()] == ["finished", "running", "pruned"]


def test_all_trials_failing_ends_the_sweep_with_the_first_error(tmp_path: Path) -> None:
    tune = Tune(make_ledger(tmp_path, budget={"trials": 6}), at_once=1)
    for number in range(3):
        tune.end(tune.start(), error=f"DataError: film {number}")
    assert tune.queue.suggest("next") == Searcher.FINISHED
    assert isinstance(tune.queue.failure, TrainingError)
    assert "All 3 trials failed. The first, trial-0000: DataError: film 0" in str(tune.queue.failure)


def test_a_lost_process_is_a_failed_trial_and_others_go_on(tmp_path: Path) -> None:
    tune = Tune(make_ledger(tmp_path), at_once=1)
    tune.stop(tune.start(), lost=True)
    assert "process was lost" in tune.ledger.read("trial-0000").error
    assert tune.start() == "trial-0001"


@pytest.mark.parametrize("changes", [{"objectives": {"f1": "max"}}, {"scheduler": {"metric": "f1"}}])
def test_a_metric_that_no_trial_reports_is_named_with_those_there_are(tmp_path: Path, changes: dict[str, Any]) -> None:
    tune = Tune(make_ledger(tmp_path, **changes), at_once=1)
    name = tune.start()
    tune.tell(name, 8, 0.5, last=True)
    tune.end(name)
    assert isinstance(tune.queue.failure, ConfigError)
    assert "No trial reports 'f1'" in str(tune.queue.failure)
    assert "findings_f1, mirror_agreement" in str(tune.queue.failure)


def test_a_spent_budget_starts_nothing_and_stops_what_runs(tmp_path: Path) -> None:
    tune = Tune(make_ledger(tmp_path))
    base = tune.start()
    tune.budget = "the budget of 1 hours is spent"
    assert tune.queue.suggest("next") == Searcher.FINISHED
    assert not tune.queue.has_more
    assert tune.tell(base, 2, 0.5) == "STOP"
    tune.stop(base)
    assert tune.ledger.read(base).error == "the budget of 1 hours is spent"


def test_who_waits_for_the_population_is_not_pruned_and_nobody_is_asked_for_in_vain(tmp_path: Path) -> None:
    tune = Tune(make_ledger(tmp_path), num_trials=2, at_once=3)
    first, second = tune.start(), tune.start()
    assert tune.queue.suggest("next") is None, "one that runs may make room for another"
    tune.queue._choose = lambda live: pytest.fail("asked again, though nothing has ended")
    assert tune.queue.suggest("next") is None
    tune.tell(first, 2, 0.5)
    tune._result(first, {"event": "paused", "step": 2})
    tune.stop(first)
    waits = tune.ledger.read(first)
    assert (waits.status, waits.paused_at) == ("running", 2)
    tune.queue._choose = lambda live: None
    assert tune.queue.suggest("next") is None
    tune.end(second)
    assert tune.queue.suggest("next") == Searcher.FINISHED


def test_members_that_fail_do_not_end_a_population_that_has_others(tmp_path: Path) -> None:
    tune = Tune(make_ledger(tmp_path, budget={"trials": 6}), at_once=4)
    sound = tune.start()
    bad = [tune.start() for _ in range(3)]
    tune._result(sound, {"event": "paused", "step": 2})
    tune.stop(sound)
    for name in bad:
        tune.end(name, error="TrainingError: not finite")
    assert tune.queue.failure is None


def test_only_the_front_keeps_its_model(tmp_path: Path) -> None:
    tune = Tune(make_ledger(tmp_path), at_once=1)
    for agreement in (0.5, 0.9, 0.7):
        name = tune.start()
        for key in ("checkpoints/00-00000002/manifest.json", "model/manifest.json", "metrics.jsonl"):
            tune.ledger.storage.sub(f"runs/{name}").write(key, b"{}")
        tune.tell(name, 8, agreement, last=True)
        tune.end(name)
    left = sorted(item.key for item in tune.ledger.storage.list("runs/"))
    assert [key for key in left if not key.endswith("metrics.jsonl")] == ["runs/trial-0001/model/manifest.json"]
    assert len(left) == 4
