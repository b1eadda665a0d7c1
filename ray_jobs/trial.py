"""One trial of a sweep: a whole training run under Ray Train, whose validations are told to Ray Tune once they are in storage."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune

from ray_jobs.train import run_training
from ssacl.config import Config
from ssacl.data.storage import MissingObjectError, Storage
from ssacl.errors import SSACLError, StorageError
from ssacl.sweeps.config import POINTING, Sweep
from ssacl.sweeps.ledger import Ledger, Trial
from ssacl.sweeps.population import leg_end
from ssacl.training.reporter import MetricsLog, Record
from ssacl.training.resume import run_storage

logger = logging.getLogger(__name__)

POLL_S = 1.0


def run_trial(chosen: dict[str, Any], sweep: Sweep, environment: Mapping[str, str]) -> None:
    """What the actor of a trial runs; `chosen["name"]` is a trial of the ledger.

    Tune hears every validation ("validation"), then "end", "paused" where the trial waits for the rest of its population, or "failed"
    with the error: what a trial's own error ends is not tried again.
    """
    os.environ.update(environment)
    ledger = Ledger(sweep)
    trial = ledger.read(chosen["name"])
    try:
        config, until_step = ledger.run_config(trial), leg_end(sweep.config, trial)
        told = _Told(run_storage(config), config)
        with tempfile.TemporaryDirectory(prefix="ssacl-trial-") as folder, told.live():
            result = run_training(config, progress=False, out_folder=Path(folder), until_step=until_step)
        told.look()
        if not result.model_url:
            tune.report({"event": "paused", "step": until_step})
            return
        masks, test = _final(sweep, trial, result.model_url, config.data.url)
        tune.report({"event": "end", "masks": json.dumps(masks), "test": json.dumps(test)})
    except SSACLError as error:
        tune.report({"event": "failed", "error": f"{type(error).__name__}: {error}"})
    # Whatever it is: a bug that every trial meets must be told, and not be tried three times each.
    except Exception as error:
        logger.exception("the trial %s failed", chosen["name"])
        tune.report({"event": "failed", "error": f"{type(error).__name__}: {error}"})


def _final(sweep: Sweep, trial: Trial, model_url: str, data_url: str) -> tuple[dict[str, float], dict[str, float]]:
    """What masks say of a finished model on validation; and its figures on test, in the stability check."""
    from ssacl.evaluation.quick import anatomy_pointing, final_figures

    points, truth, num_test = POINTING in sweep.config.objectives, sweep.config.truth, sweep.config.stability.num_test_films
    masks = {POINTING: anatomy_pointing(model_url, data_url, truth, sweep.config.num_films)} if points else {}
    if trial.kind == "search" or not num_test:
        return masks, {}
    test = final_figures(model_url, data_url, num_test)
    if points:
        test[POINTING] = anatomy_pointing(model_url, data_url, truth, num_test, "test")
    return masks, test


class _Told:
    """Tells Tune the validations in a run's stored metrics, each once. They are stored with a checkpoint, so what Tune decides on outlives
    every process."""

    def __init__(self, storage: Storage, config: Config) -> None:
        self._storage, self._step = storage, 0
        self._last_stage = len(config.run.stages) - 1
        self._done = threading.Event()

    def look(self) -> None:
        """Tell what is new."""
        try:
            records = MetricsLog.parse(self._storage.read(MetricsLog.KEY)).records
        except MissingObjectError:
            return
        for record in records:
            if record["event"] == "validation" and record["run_step"] > self._step:
                self._step = record["run_step"]
                # As text: Tune flattens what is nested.
                tune.report({"event": "validation", "record": json.dumps(self._point(record))})

    @contextmanager
    def live(self) -> Iterator[None]:
        """Look every second while the block runs."""
        thread = threading.Thread(target=self._keep_looking, name="trial-told", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _keep_looking(self) -> None:
        while not self._done.wait(POLL_S):
            try:
                self.look()
            except StorageError as error:
                # The run waits for its storage, and fails by name when that takes too long.
                logger.info("metrics cannot be read now: %s", error)

    def _point(self, record: Record) -> dict[str, Any]:
        last = record["stage_index"] == self._last_stage and record["step"] == record["num_steps"]
        place = {"step": record["run_step"], "stage": record["stage"], "last": last}
        return {**record["losses"], **record.get("figures", {}), **place}
