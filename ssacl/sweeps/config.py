"""What a sweep is: base configuration, space, objectives, search, pruning and budget; one typed tree from one YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssacl.changes import CHANGEABLE, why_fixed
from ssacl.config import Config, Count, load_config
from ssacl.errors import ConfigError
from ssacl.sweeps.space import Domain, check_space
from ssacl.training.settings import run_settings

POINTING = "anatomy_pointing"
"""Measured on the finished model, as training never opens masks: no rung knows it."""
FIGURES = ("findings_f1", "mirror_agreement", POINTING)
"""Metrics that are better the higher they are; the others are losses."""
DEFAULT_TRIAL = "trial-0000"
"""The base configuration as it stands: always the first trial, and never pruned."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseRun(_Section):
    """The training configuration that trials start from."""

    config: str = Field("", description="A training configuration, relative to the sweep's file; empty: the defaults.")
    overrides: tuple[str, ...] = Field((), description="KEY=VALUE, as `ssacl train` takes them.")


class Searcher(_Section):
    kind: Literal["tpe", "random"] = Field(
        "tpe", description="Optuna's TPE, multi-objective with several objectives; or independent draws."
    )
    num_random: Count = Field(6, description="`tpe`: first trials that are drawn at random.")


class Scheduler(_Section):
    kind: Literal["asha", "pbt", "none"] = Field(
        "asha", description="`asha` stops trials that fall behind; `pbt` (population-based training) puts copies of others in their place."
    )
    metric: str = Field("", description="What rungs compare; empty: the first objective.")
    first_rung_steps: Count = Field(
        300,
        description="Optimizer steps, over all stages, before a trial may be stopped; `pbt`: between two comparisons of the population.",
    )
    factor: float = Field(
        3.0, gt=1, description="`asha`: each rung is this many times the one before; the best 1/factor of its trials go on."
    )
    population: int = Field(8, ge=2, description="`pbt`: trials that train side by side, the base among them.")
    quantile: float = Field(
        0.25, gt=0, le=0.5, description="`pbt`: share of the population that is replaced, by copies of as many of the best."
    )
    redraw: float = Field(0.25, ge=0, le=1, description="`pbt`: probability that a copy's value is drawn anew, not moved.")


class Budget(_Section):
    """What may be spent on the search; the first limit that is reached ends it. The stability check comes on top."""

    trials: Count = 24
    hours: float | None = Field(None, gt=0, description="Wall-clock time, over all starts of the command.")
    gpu_hours: float | None = Field(None, gt=0, description="GPUs times hours, over all trials.")

    def spent(self, hours: float, gpu_hours: float) -> str:
        """Which limit on time is used up, in words; "" while none is."""
        if self.hours is not None and hours > self.hours:
            return f"the budget of {self.hours:g} hours is spent"
        if self.gpu_hours is not None and gpu_hours > self.gpu_hours:
            return f"the budget of {self.gpu_hours:g} GPU-hours is spent"
        return ""


class Stability(_Section):
    seeds: int = Field(3, ge=0, description="Runs of the best and of the base with seeds that the search did not see; 0: no check.")
    uncertainty: bool = Field(
        True, description="Also the base with losses.balance: uncertainty: what learned weights give for the price of one run."
    )
    num_test_films: int = Field(200, ge=0, description="First films of the test split that each of these runs is scored on; 0: none.")


class SweepConfig(_Section):
    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="The same name on the same storage resumes.")
    storage_url: str = Field("sweeps", description="Folder or s3:// prefix for the ledger, the runs and the results.")
    base: BaseRun = BaseRun()
    space: dict[str, Domain] = Field(default_factory=dict, description="Dotted key of the training configuration -> its values.")
    same_sum: tuple[str, ...] = Field(
        (), description="Weights that are scaled together to the base's sum: a common factor is the learning rate's business, not theirs."
    )
    objectives: dict[str, Literal["max", "min"]] = Field(
        {"findings_f1": "max", "mirror_agreement": "max"},
        description="Figures or losses of a validation record; of each, a trial's last value counts.",
    )
    num_films: Count = Field(32, description="Validation films whose reports and maps are scored at each validation.")
    truth: str = Field("", description="Truth folder of a phantom data set: its validation masks are what `anatomy_pointing` is scored on.")
    searcher: Searcher = Searcher()
    scheduler: Scheduler = Scheduler()
    budget: Budget = Budget()
    max_concurrent: Count = Field(64, description="Trials at a time, at most; the cluster's room decides below that.")
    seed: int = Field(0, description="Of the search; runs keep the base's run.seed.")
    stability: Stability = Stability()
    registry_url: str = Field(
        "", description="Model registry (folder or s3:// prefix) in which the best model becomes a version, never promoted; empty: none."
    )

    @property
    def rung(self) -> tuple[str, str]:
        """Metric that rungs compare, and "max" or "min"."""
        metric = self.scheduler.metric or next(iter(self.objectives))
        return metric, self.objectives.get(metric, "max" if metric in FIGURES else "min")


class Sweep(_Section):
    """A sweep with the training configuration that it starts from, both resolved."""

    config: SweepConfig
    base: Config

    def identity(self) -> dict[str, Any]:
        """What a sweep of one name may not change half way; budget, concurrency and stability seeds it may."""
        free = {"storage_url", "truth", "base", "budget", "max_concurrent", "stability", "registry_url"}
        tree = self.config.model_dump(mode="json", exclude=free)
        if self.config.scheduler.kind != "pbt":
            for name in ("population", "quantile", "redraw"):
                del tree["scheduler"][name]
        return {**tree, "base": run_settings(self.base)}


def load_sweep(path: str | Path, overrides: Sequence[str] = (), changes: Mapping[str, Any] | None = None) -> Sweep:
    """Read a sweep's YAML file and the training configuration that it names.

    Parameters
    ----------
    overrides
        KEY=VALUE of the training configuration, after those of the file.
    changes
        Dotted keys of the sweep itself to replace; none-values are left as they are.

    Raises
    ------
    ConfigError
        A file cannot be read, a key is unknown, or values contradict each other.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the sweep {path}: {error.strerror}. An example is configs/tune_loss_weights.yaml.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping (name, base, space, objectives, ...). An example is configs/tune_loss_weights.yaml.")
    for key, value in (changes or {}).items():
        section, _, last = key.rpartition(".")
        if value is not None and section:
            tree[section] = tree.get(section) or {}
        if value is not None and isinstance(inner := tree[section] if section else tree, dict):
            inner[last] = value
    try:
        config = SweepConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(item)) for item in error.errors())) from error
    place = Path(path).parent / config.base.config if config.base.config else None
    return checked_sweep(config, load_config(place, (*config.base.overrides, *overrides)))


def checked_sweep(config: SweepConfig, base: Config) -> Sweep:
    """
    Raises
    ------
    ConfigError
        Space, objectives, pruning and budget do not go together, or not with the base.
    """
    check_space(base, config.space, config.same_sum)
    if not config.objectives:
        raise ConfigError("The sweep has no objective: give at least one, as in objectives: {findings_f1: max}.")
    if POINTING in config.objectives and not config.truth:
        raise ConfigError(f"The objective '{POINTING}' needs masks: give truth, a phantom's truth folder, or use mirror_agreement.")
    if config.rung[0] == POINTING and config.scheduler.kind != "none":
        raise ConfigError(f"'{POINTING}' is measured on finished models: name another scheduler.metric, as mirror_agreement.")
    if config.scheduler.kind == "pbt":
        _check_population(config, base)
    if config.budget.gpu_hours is not None and not base.run.use_gpu:
        raise ConfigError("budget.gpu_hours limits nothing, as run.use_gpu is false. Use budget.hours or budget.trials.")
    return Sweep(config=config, base=base.model_copy(update={"run": base.run.model_copy(update={"num_figure_films": config.num_films})}))


def _check_population(config: SweepConfig, base: Config) -> None:
    """
    Raises
    ------
    ConfigError
        A key of the space cannot change half way, the base has changes of its own, or no trial is left for a successor.
    """
    for key in (*config.space, *config.same_sum):
        if reason := why_fixed(key):
            raise ConfigError(
                f"scheduler.kind pbt changes settings half way, and '{key}' cannot: {reason}. Take it out, or use asha. "
                f"Keys that can: {', '.join(CHANGEABLE)}."
            )
    if base.run.changes:
        raise ConfigError("scheduler.kind pbt finds run.changes itself: take them out of the base.")
    if config.budget.trials <= config.scheduler.population:
        raise ConfigError(
            f"budget.trials {config.budget.trials} leaves no successor to a population of {config.scheduler.population}: every copy is a "
            "trial. Give more trials, or a smaller scheduler.population."
        )


def _explain(item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "sweep"
    if item["type"] == "extra_forbidden":
        return f"unknown key '{where}' in the sweep. Known keys: {', '.join(SweepConfig.model_fields)}."
    return f"{where}: {str(item['msg']).removeprefix('Value error, ')} (got {item['input']!r})"
