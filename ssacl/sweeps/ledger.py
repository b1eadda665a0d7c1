"""The sweep's ledger: one small JSON object per trial, written whole before and after everything that happens to it.

<storage_url>/<name>/
    sweep.json             what the sweep is; another one of the same name is refused
    trials/NAME.json       a `Trial`
    generations/NNNN.json  a `Generation`, under population-based training
    runs/NAME/             its training run, as `ssacl train` leaves one
    sweep.lock             while the command is alive
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssacl.changes import Change
from ssacl.config import Config
from ssacl.data.lease import Holder
from ssacl.data.storage import Storage, open_storage
from ssacl.errors import ConfigError, StorageError
from ssacl.sweeps.config import Sweep
from ssacl.sweeps.space import look_up, with_values
from ssacl.training.checkpoint import config_differences

HOLDER = Holder("sweep", "Let it end, or stop it, then run the same command again; or choose another name.", key="sweep.lock")
IDENTITY, CLOCK = "sweep.json", "clock.json"
CHECKS = ("base", "best", "uncertainty")
"""Kinds of trials in the stability check."""

Status = Literal["running", "finished", "pruned", "failed"]


class Past(BaseModel):
    """A part of what a copy was trained with before it was one."""

    model_config = ConfigDict(extra="forbid")

    name: str
    """The trial that trained it."""
    point: dict[str, Any]
    until_step: int
    """Optimizer steps, over all stages, that were done when it was copied."""


class Trial(BaseModel):
    """One run of a sweep. `kind` is "search"; or "base", "best" or "uncertainty" (the base with learned weights) in the stability check."""

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: Literal["search", "base", "best", "uncertainty"] = "search"
    point: dict[str, Any] = Field(default_factory=dict)
    """What the search drew; `same_sum` is not yet applied."""
    seed: int
    status: Status = "running"
    curve: list[dict[str, Any]] = Field(default_factory=list)
    """Per validation: `step` (optimizer steps over all stages), `stage`, and every loss and figure by name."""
    test: dict[str, float] = Field(default_factory=dict)
    """Figures on the test split, in the stability check."""
    error: str = ""
    busy_s: float = 0.0
    """Time that it ran, over all its starts."""
    past: list[Past] = Field(default_factory=list)
    """Under population-based training, of a copy: what it was before, the oldest first."""
    paused_at: int = 0
    """Steps after which it waits for the rest of the population, with a checkpoint."""

    @property
    def number(self) -> int:
        return int(self.name.rpartition("-")[2])

    def value(self, metric: str) -> float | None:
        """The last value of a metric; none where no validation had it."""
        return next((float(record[metric]) for record in reversed(self.curve) if metric in record), None)

    @property
    def step(self) -> int:
        return int(self.curve[-1]["step"]) if self.curve else 0

    @property
    def came_through(self) -> bool:
        """Whether it trained to its end, to a rung that stopped it, or to where the population waits."""
        return self.status in ("finished", "pruned") or (self.status == "running" and self.paused_at > 0)

    @property
    def forked_at(self) -> int:
        """Steps that it did not take itself."""
        return self.past[-1].until_step if self.past else 0


class Fork(BaseModel):
    """A new trial that goes on from a copy of `parent`'s checkpoint, in the place of `replaces`."""

    model_config = ConfigDict(extra="forbid")

    name: str
    parent: str
    replaces: str
    point: dict[str, Any]


class Generation(BaseModel):
    """What the population came to after `step` optimizer steps; written once, before anything follows from it."""

    model_config = ConfigDict(extra="forbid")

    step: int
    scores: dict[str, float | None]
    """Of every member; none for one that failed."""
    forks: list[Fork]


class Ledger:
    """The trials of one sweep in its storage.

    Raises
    ------
    ConfigError
        The name belongs to a sweep of another space, base, objective or seed.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.storage: Storage = open_storage(sweep.config.storage_url).sub(sweep.config.name)

    def claim(self) -> None:
        """Write down what the sweep is, or check it against what is there; held by the lease of `HOLDER`."""
        identity = json.loads(json.dumps(self.sweep.identity()))
        if self.storage.exists(IDENTITY):
            differences = config_differences(json.loads(self.storage.read(IDENTITY)), identity)
            if differences:
                raise ConfigError(
                    f"The sweep '{self.sweep.config.name}' was started with other settings: {'; '.join(differences)}. "
                    "Take them back, or choose another name."
                )
        else:
            self.storage.write(IDENTITY, json.dumps(identity, indent=1).encode())

    def trials(self, *kinds: str) -> list[Trial]:
        """All trials of some kinds (the search's, if none is named), by name."""
        found = [self.read(item.key.removeprefix("trials/").removesuffix(".json")) for item in self.storage.list("trials/")]
        return [trial for trial in found if trial.kind in (kinds or ("search",))]

    def read(self, name: str) -> Trial:
        """
        Raises
        ------
        StorageError
            There is no such trial, or its record is damaged.
        """
        content = self.storage.read(_key(name))
        try:
            return Trial.model_validate_json(content)
        except ValidationError as error:
            raise StorageError(
                f"The record {_key(name)} of {self.storage.url} is damaged. Delete it: the trial then runs again."
            ) from error

    def write(self, trial: Trial) -> None:
        self.storage.write(_key(trial.name), trial.model_dump_json(indent=1).encode())

    def generations(self) -> list[Generation]:
        """In their order."""
        return [Generation.model_validate_json(self.storage.read(item.key)) for item in self.storage.list("generations/")]

    def write_generation(self, generation: Generation) -> None:
        self.storage.write(f"generations/{len(self.generations()) + 1:04d}.json", generation.model_dump_json(indent=1).encode())

    def run(self, name: str) -> Storage:
        """Where a trial's training run lies."""
        return self.storage.sub(f"runs/{name}")

    def run_config(self, trial: Trial) -> Config:
        """The whole training configuration of a trial; its run lies below the sweep's storage."""
        config = trial_config(self.sweep, trial)
        run = config.run.model_copy(update={"name": trial.name, "storage_url": self.storage.sub("runs").url})
        return config.model_copy(update={"run": run})

    @property
    def elapsed_s(self) -> float:
        """Wall-clock time of the search over all starts of the command."""
        return float(json.loads(self.storage.read(CLOCK))["elapsed_s"]) if self.storage.exists(CLOCK) else 0.0

    def set_elapsed(self, elapsed_s: float) -> None:
        self.storage.write(CLOCK, json.dumps({"elapsed_s": elapsed_s}).encode())

    def drop_run(self, trial: Trial, keep_model: bool) -> None:
        """Delete a trial's checkpoints, and its model unless that is to stay; metrics and curves stay."""
        run = self.run(trial.name)
        for folder in ("checkpoints/",) if keep_model else ("checkpoints/", "model/"):
            # Manifests first: nothing is then ever half there.
            for item in sorted(run.list(folder), key=lambda item: not item.key.endswith("manifest.json")):
                run.delete(item.key)


def trial_config(sweep: Sweep, trial: Trial) -> Config:
    """The training configuration of a trial, under the base's own name and storage."""
    config = with_values(sweep.base, trial.past[0].point if trial.past else trial.point, sweep.config.same_sum)
    run: dict[str, Any] = {"seed": trial.seed}
    if trial.past:
        run["changes"] = tuple(Change(after_steps=start, values=values) for start, values in trial_schedule(sweep, trial)[1:])
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def trial_schedule(sweep: Sweep, trial: Trial) -> list[tuple[int, dict[str, Any]]]:
    """(optimizer steps done before, dotted key -> value from then on) of a trial and what it was copied from; one entry if of nothing."""
    starts = [0, *(past.until_step for past in trial.past)]
    keys = dict.fromkeys((*sweep.config.space, *trial.point, *sweep.config.same_sum))
    schedule = []
    for start, point in zip(starts, [*(past.point for past in trial.past), trial.point], strict=True):
        config = with_values(sweep.base, point, sweep.config.same_sum)
        schedule.append((start, {key: look_up(config, key) for key in keys}))
    return schedule


def _key(name: str) -> str:
    return f"trials/{name}.json"
