"""A sweep on Ray Tune: trials are whole Ray Train runs, the ledger in storage says what has been done; then a check with other seeds."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.placement_group import NODE_ID_LABEL_KEY

from ray_jobs.elastic import free_left_room, require_room, room_for_workers, worker_counts
from ray_jobs.session import ray_session, storage_environment
from ray_jobs.sweep_queue import Rungs, TrialQueue, drop_losers, find_failure
from ray_jobs.trial import run_trial
from ssacl.data.lease import hold_lease
from ssacl.data.loader import open_split
from ssacl.data.storage import open_storage
from ssacl.errors import TrainingError
from ssacl.registry.versions import version_names
from ssacl.sweeps.config import DEFAULT_TRIAL, Sweep
from ssacl.sweeps.front import best_trial
from ssacl.sweeps.ledger import CHECKS, HOLDER, Ledger, Trial
from ssacl.sweeps.population import members, next_member
from ssacl.sweeps.results import Results, export_best, register_best, write_results
from ssacl.sweeps.search import propose
from ssacl.sweeps.space import look_up

logger = logging.getLogger(__name__)

_NOTE_S = 5.0
_FREE_S = 1.0
_QUIET_TUNE = {
    # Configurations name data by paths from here.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Ctrl-C is the usual KeyboardInterrupt.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # A stopped trial's process that does not end by itself is ended.
    "TUNE_FORCE_TRIAL_CLEANUP_S": "20",
    # The ledger is the state: Tune's own copy of it is not wanted.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
}


def run_sweep(sweep: Sweep, address: str | None = None, out_folder: Path | None = None) -> Results:
    """Run what is left of a sweep, then its stability check, and write the results.

    Parameters
    ----------
    address : as in `run_training`.
    out_folder : where the results also go on this machine; none: sweeps/<name>.

    Raises
    ------
    ConfigError
        The name belongs to another sweep, a trial does not fit into the cluster, or no trial reports an objective.
    TrainingError
        All trials fail.
    BusyError
        The same sweep runs elsewhere.
    """
    counts = worker_counts(sweep.base)
    if sweep.config.registry_url:
        # So that a registry that is down or refuses is told before any trial.
        version_names(open_storage(sweep.config.registry_url))
    open_split(open_storage(sweep.base.data.url), "train", purpose="training")
    # The same place from every process.
    places = {
        "storage_url": open_storage(sweep.config.storage_url).url,
        "truth": sweep.config.truth and str(Path(sweep.config.truth).absolute()),
    }
    sweep = sweep.model_copy(update={"config": sweep.config.model_copy(update=places)})
    ledger = Ledger(sweep)
    num_cpus = max(os.cpu_count() or 1, math.ceil(counts[-1] * sweep.base.run.cpus_per_train_worker))
    with hold_lease(ledger.storage, HOLDER), ray_session(num_cpus=num_cpus, address=address) as dashboard:
        if dashboard:
            logger.info("Ray dashboard: %s", dashboard)
        ledger.claim()
        require_room(sweep.base, counts[0])
        at_once = sweep.config.max_concurrent
        # A cluster that grows by itself does so for the trials that wait.
        if sweep.base.run.node_wait_s == 0:
            at_once = max(1, min(at_once, room_for_workers(sweep.base) // counts[-1]))
        logger.info("sweep in %s; %d trials at a time", ledger.storage.url, at_once)
        _try_failed_again(ledger)
        _search(ledger, at_once)
        failure = find_failure(sweep, ledger.trials())
        if failure is not None:
            raise failure
        best = best_trial(ledger.trials(), sweep.config.objectives)
        if best is None:
            raise TrainingError("The budget ended before any trial had trained to its end: give the sweep more, and run it again.")
        export_best(ledger)
        registered = register_best(ledger)
        if registered:
            logger.info("the best model is registered as %s", registered)
        _stability(ledger, best, at_once)
        drop_losers(ledger, patient=True)
    return write_results(ledger, out_folder or Path("sweeps") / sweep.config.name, registered)


def _search(ledger: Ledger, at_once: int) -> None:
    config, base = ledger.sweep.config, ledger.sweep.base
    started, before_s, noted_s = time.monotonic(), ledger.elapsed_s, 0.0
    gpus = worker_counts(base)[-1] * base.run.gpus_per_train_worker

    def is_spent() -> str:
        nonlocal noted_s
        elapsed_s = before_s + time.monotonic() - started
        # Tune asks many times a second.
        if elapsed_s - noted_s > _NOTE_S:
            noted_s = elapsed_s
            ledger.set_elapsed(elapsed_s)
        busy_s = sum(trial.busy_s for trial in ledger.trials()) if config.budget.gpu_hours is not None else 0.0
        return config.budget.spent(elapsed_s / 3600, gpus * busy_s / 3600)

    def start(trials: Sequence[Trial]) -> Trial:
        name = f"trial-{len(trials):04d}"
        point = {key: look_up(base, key) for key in config.space} if name == DEFAULT_TRIAL else propose(config, trials, len(trials))
        return Trial(name=name, point=point, seed=base.run.seed)

    def choose(live: set[str]) -> Trial | None:
        if config.scheduler.kind == "pbt":
            return next_member(ledger, live, start)
        trials = ledger.trials()
        left = [trial for trial in trials if trial.status == "running" and trial.name not in live]
        if left:
            return left[0]
        return start(trials) if len(trials) < config.budget.trials else None

    queue = TrialQueue(ledger, choose, at_once, is_spent)
    _run_trials(ledger, queue, Rungs(ledger, queue))


def _stability(ledger: Ledger, best: Trial, at_once: int) -> None:
    """Train the best, and the base as it is and with learned weights, with seeds that the search did not see: the best of many draws is
    partly luck."""
    base, check = ledger.sweep.base, ledger.sweep.config.stability
    arms: list[tuple[str, dict[str, Any]]] = []
    if best.name != DEFAULT_TRIAL:
        arms.append((best.name, {"kind": "best", "point": best.point, "past": best.past}))
    if check.uncertainty and base.losses.balance != "uncertainty":
        arms.append(("uncertainty", {"kind": "uncertainty", "point": {"losses.balance": "uncertainty"}}))
    planned = []
    for seed in range(1, check.seeds + 1) if arms else ():
        planned.append(Trial(name=f"base-seed-{seed}", kind="base", seed=base.run.seed + seed))
        planned += [Trial(name=f"{name}-seed-{seed}", seed=base.run.seed + seed, **what) for name, what in arms]
    for trial in ledger.trials(*CHECKS):
        if trial.status == "failed":
            ledger.write(trial.model_copy(update={"status": "running", "error": ""}))

    def choose(live: set[str]) -> Trial | None:
        known = {trial.name: trial for trial in ledger.trials(*CHECKS)}
        waiting = [known.get(trial.name, trial) for trial in planned if trial.name not in live]
        return next((trial for trial in waiting if trial.status == "running"), None)

    queue = TrialQueue(ledger, choose, at_once, lambda: "")
    _run_trials(ledger, queue, tune.schedulers.FIFOScheduler())


def _run_trials(ledger: Ledger, queue: TrialQueue, scheduler: tune.schedulers.TrialScheduler) -> None:
    if not queue.has_more:
        return
    with tempfile.TemporaryDirectory(prefix="ssacl-ray-tune-") as folder:
        os.environ.update(_QUIET_TUNE)
        trainable = tune.with_resources(
            tune.with_parameters(run_trial, sweep=ledger.sweep, environment=storage_environment()),
            # The trial itself only waits: on the driver's node, which has to live anyway. Its train workers take what they need, anywhere.
            tune.PlacementGroupFactory(
                [{"memory": 1}], bundle_label_selector=[{NODE_ID_LABEL_KEY: ray.get_runtime_context().get_node_id()}]
            ),
        )
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(search_alg=queue, scheduler=scheduler, num_samples=-1, reuse_actors=False),
            run_config=tune.RunConfig(
                name=ledger.sweep.config.name,
                storage_path=folder,
                verbose=0,
                callbacks=[_FreesRoom()],
                # Of the trial's own process: its run goes on from its checkpoints.
                failure_config=tune.FailureConfig(max_failures=ledger.sweep.base.run.max_restarts),
            ),
        )
        tuner.fit()
    if queue.failure is not None:
        raise queue.failure


class _FreesRoom(tune.Callback):  # type: ignore[misc]
    """Gives the next trial what one that was stopped, or whose process was lost, still holds; it dies some time after Tune was told."""

    _at = 0.0

    def on_step_end(self, iteration: int, trials: list[tune.experiment.Trial], **info: Any) -> None:
        if time.monotonic() - self._at > _FREE_S:
            self._at = time.monotonic()
            free_left_room()


def _try_failed_again(ledger: Ledger) -> None:
    trials = ledger.trials()
    if not any(trial.came_through for trial in trials):
        for trial in members(trials, ledger.generations()):
            if trial.status == "failed":
                ledger.write(trial.model_copy(update={"status": "running", "error": ""}))
