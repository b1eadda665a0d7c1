"""Population-based training without Ray: who is replaced, by whom, with what; and that a generation is decided and carried out once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweep_files import sweep_tree

from ssacl.changes import CHANGEABLE
from ssacl.config import Config, load_config
from ssacl.errors import CheckpointError, ConfigError
from ssacl.sweeps import population
from ssacl.sweeps.config import Sweep, SweepConfig, checked_sweep
from ssacl.sweeps.front import best_so_far
from ssacl.sweeps.ledger import Ledger, Past, Trial, trial_config
from ssacl.sweeps.population import decide, explore, leg_end, members, next_member
from ssacl.sweeps.results import write_results
from ssacl.sweeps.space import Domain, look_up
from ssacl.training.legs import legs
from ssacl.training.reporter import MetricsLog
from ssacl.training.sealed import seal, upload_folder

SPACE = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "losses.soft_target": {"choice": ["identity", "across_samples", "official"]}}
PBT = {"kind": "pbt", "metric": "total", "first_rung_steps": 10, "population": 4, "quantile": 0.5}


def make_sweep(folder: Path, **changes: Any) -> Sweep:
    tree = sweep_tree(folder) | {"base": {}, "space": SPACE, "objectives": {"total": "min"}, "scheduler": PBT, "budget": {"trials": 7}}
    return checked_sweep(SweepConfig.model_validate(tree | changes), Config())


def waiting(number: int, score: float | None, step: int = 10, **what: Any) -> Trial:
    """A trial that trained to `step` and has come to `score`; none: it failed."""
    curve = [] if score is None else [{"step": step, "stage": "joint", "last": False, "total": score}]
    point = {"optim.lr": 1e-3 * (number + 1), "losses.soft_target": "identity"}
    fields = {"seed": 0, "status": "failed" if score is None else "running", "curve": curve, "point": point, "paused_at": step}
    return Trial.model_validate({"name": f"trial-{number:04d}", **fields, **what})


@pytest.mark.parametrize("key", ["losses.initial_tau", "losses.balance", "model.vision.depth", "engine.micro_batch_size"])
def test_what_cannot_change_half_way_is_no_key_of_a_population(tmp_path: Path, key: str) -> None:
    values = ["fixed", "uncertainty"] if key == "losses.balance" else [2, 3]
    with pytest.raises(ConfigError, match=rf"half way, and '{key}' cannot: it .*Keys that can: optim\.lr"):
        make_sweep(tmp_path, space={key: {"choice": values}})


def test_a_population_needs_trials_for_its_copies_and_a_base_that_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves no successor to a population of 4"):
        make_sweep(tmp_path, budget={"trials": 4})
    config, base = make_sweep(tmp_path).config, load_config(None, ["run.changes=[{after_steps: 5, values: {optim.lr: 0.1}}]"])
    with pytest.raises(ConfigError, match=r"finds run\.changes itself"):
        checked_sweep(config, base)
    for key in CHANGEABLE:
        look_up(Config(), key)


def test_other_sweeps_are_what_they_were_before_there_were_populations(tmp_path: Path) -> None:
    asha = make_sweep(tmp_path, scheduler={"kind": "asha", "metric": "total"})
    assert set(asha.identity()["scheduler"]) == {"kind", "metric", "first_rung_steps", "factor"}
    assert make_sweep(tmp_path).identity()["scheduler"]["population"] == 4


def test_the_worst_are_replaced_by_copies_of_the_best(tmp_path: Path) -> None:
    config = make_sweep(tmp_path).config
    population_ = [waiting(0, 9.0), waiting(1, 3.0), waiting(2, 1.0), waiting(3, 5.0), waiting(4, 2.0), waiting(5, None)]
    generation = decide(config, population_, 1, 6)
    assert generation.step == 10
    assert generation.scores == {"trial-0000": 9.0, "trial-0001": 3.0, "trial-0002": 1.0, "trial-0003": 5.0, "trial-0004": 2.0} | {
        "trial-0005": None
    }
    # Bottom half: the failed one, the base, and the third; the base stays, and the budget has one trial left.
    assert [(fork.name, fork.replaces) for fork in generation.forks] == [("trial-0006", "trial-0005")]
    assert generation.forks[0].parent in {"trial-0001", "trial-0002", "trial-0004"}
    richer = make_sweep(tmp_path, budget={"trials": 20}).config
    assert [(fork.name, fork.replaces) for fork in decide(richer, population_, 1, 6).forks] == [
        ("trial-0006", "trial-0005"),
        ("trial-0007", "trial-0003"),
    ]
    assert decide(config, list(reversed(population_)), 1, 6) == generation, "whatever the order"
    drawn = {decide(make_sweep(tmp_path, seed=seed).config, population_, 1, 6).forks[0].parent for seed in range(20)}
    assert drawn == {"trial-0001", "trial-0002", "trial-0004"}
    upwards = make_sweep(tmp_path, objectives={"total": "max"}, budget={"trials": 20}).config
    assert {fork.replaces for fork in decide(upwards, population_, 1, 6).forks} == {"trial-0005", "trial-0002", "trial-0004"}


def test_nobody_is_replaced_by_one_that_is_no_better(tmp_path: Path) -> None:
    config = make_sweep(tmp_path).config
    assert decide(config, [waiting(number, 1.0) for number in range(4)], 1, 4).forks == []
    assert decide(config, [waiting(0, 3.0), waiting(1, 2.0)], 1, 2).forks == [], "the base alone is worse"
    unknown = [waiting(number, 1.0, curve=[]) for number in range(4)]
    assert decide(config, unknown, 1, 4).forks == [], "nothing is known of the metric yet"


def test_a_copy_moves_its_parents_values_or_draws_them_anew(tmp_path: Path) -> None:
    config = make_sweep(tmp_path, scheduler=PBT | {"redraw": 0.0}).config
    point = {"optim.lr": 1e-3, "losses.soft_target": "across_samples"}
    moved = [explore(config, point, np.random.default_rng(seed)) for seed in range(40)]
    assert {round(each["optim.lr"], 9) for each in moved} == {1.25e-3, 0.8e-3}
    assert {each["losses.soft_target"] for each in moved} == {"identity", "official"}
    ends = explore(config, {"optim.lr": 5.0, "losses.soft_target": "unknown"}, np.random.default_rng(0))
    assert ends["optim.lr"] == 1e-2, "within the domain, even where the base lies outside of it"
    assert ends["losses.soft_target"] in SPACE["losses.soft_target"]["choice"]
    anew = make_sweep(tmp_path, scheduler=PBT | {"redraw": 1.0}).config
    drawn = np.log10([explore(anew, point, np.random.default_rng(seed))["optim.lr"] for seed in range(400)])
    assert abs(drawn.mean() + 3) < 0.1, "even on a logarithmic scale"
    assert drawn.std() == pytest.approx(2 / np.sqrt(12), rel=0.1)
    assert list(moved[0]) == list(SPACE)
    half = Domain(choice=("a", "b"))
    assert [half.at(share) for share in (0.0, 0.49, 0.5, 1.0)] == ["a", "a", "b", "b"]
    assert [half.moved("a", False), half.moved("b", True)] == ["a", "b"]


class Command:
    """Plays the sweep's command: starts what comes next, and lets it train to where the population waits."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.ledger = Ledger(make_sweep(folder, max_concurrent=2, **changes))
        self.live: set[str] = set()

    def draw(self, trials: Sequence[Trial]) -> Trial:
        number = len(trials)
        return Trial(name=f"trial-{number:04d}", seed=0, point={"optim.lr": 1e-3 + 1e-4 * number, "losses.soft_target": "identity"})

    def start(self) -> str | None:
        trial = next_member(self.ledger, self.live, self.draw)
        if trial is None:
            return None
        self.ledger.write(trial)
        self.live.add(trial.name)
        return trial.name

    def train(self, name: str, score: float) -> None:
        trial = self.ledger.read(name)
        end = leg_end(self.ledger.sweep.config, trial)
        assert end is not None
        trial.curve.append({"step": end, "stage": "joint", "last": False, "total": score})
        folder = Path(self.ledger.storage.sub("made").url) / f"{name}-{end}"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_text(f"{name} after {end}")
        seal(folder, {"run_step": end})
        self.ledger.run(name).write(MetricsLog.KEY, f'{{"event": "step", "run_step": {end}}}\n'.encode())
        upload_folder(folder, self.ledger.run(name), f"checkpoints/00-{end:08d}")
        trial.paused_at = end
        self.ledger.write(trial)
        self.live.discard(name)


def test_all_members_wait_for_the_last_one_and_copies_go_on_from_there(tmp_path: Path) -> None:
    command = Command(tmp_path)
    assert [command.start(), command.start()] == ["trial-0000", "trial-0001"]
    command.train("trial-0001", 4.0)
    assert command.start() == "trial-0002", "before the first goes on, all have to have come as far"
    command.train("trial-0000", 2.0)
    command.train("trial-0002", 1.0)
    assert command.start() == "trial-0003"
    assert command.start() is None, "the last one still trains"
    assert command.ledger.generations() == []
    command.train("trial-0003", 3.0)
    started = [command.start() for _ in range(5)]
    assert started == ["trial-0000", "trial-0002", "trial-0004", "trial-0005", None]
    [generation] = command.ledger.generations()
    assert {fork.replaces for fork in generation.forks} == {"trial-0001", "trial-0003"}
    for fork in generation.forks:
        copy, parent = command.ledger.read(fork.name), command.ledger.read(fork.parent)
        assert fork.parent in {"trial-0000", "trial-0002"}
        assert copy.past == [Past(name=parent.name, point=parent.point, until_step=10)]
        assert (copy.curve, copy.forked_at, leg_end(command.ledger.sweep.config, copy)) == (parent.curve, 10, 20)
        assert command.ledger.run(copy.name).read("checkpoints/00-00000010/state.pt") == f"{parent.name} after 10".encode()
        loser = command.ledger.read(fork.replaces)
        assert (loser.status, loser.error) == ("pruned", f"replaced by {copy.name}, a copy of {parent.name}")


def test_a_command_killed_while_copies_are_made_makes_the_same_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path, kill_after: int | None) -> Ledger:
        command = Command(folder)
        for score in (2.0, 4.0, 1.0, 3.0):
            name = command.start()
            assert name is not None
            command.train(name, score)
        if kill_after is not None:
            real, done = population.fork_run, []

            def killed(*arguments: Any) -> None:
                if len(done) == kill_after:
                    raise KeyboardInterrupt
                done.append(real(*arguments))

            monkeypatch.setattr(population, "fork_run", killed)
            with pytest.raises(KeyboardInterrupt):
                command.start()
            monkeypatch.setattr(population, "fork_run", real)
            # More trials may be had now; what was decided stays.
            command = Command(folder, budget={"trials": 9})
        assert command.start() is not None
        return command.ledger

    whole = run(tmp_path / "whole", None)
    for kill_after in (0, 1):
        again = run(tmp_path / f"killed-{kill_after}", kill_after)
        assert again.generations() == whole.generations()
        assert again.trials() == whole.trials()
        assert len(again.trials()) == 6


def test_a_failed_member_is_replaced_once_and_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    command = Command(tmp_path, scheduler=PBT | {"quantile": 0.25})
    for score in (2.0, 1.0, 3.0):
        name = command.start()
        assert name is not None
        command.train(name, score)
    name = command.start()
    assert name == "trial-0003"
    command.ledger.write(command.ledger.read(name).model_copy(update={"status": "failed", "error": "TrainingError: not finite"}))
    command.live.discard(name)
    moved = command.ledger.run("trial-0001")
    content = moved.read("checkpoints/00-00000010/manifest.json")
    moved.delete("checkpoints/00-00000010/manifest.json")
    with pytest.raises(CheckpointError, match="no checkpoint after 10 optimizer steps"):
        command.start()
    moved.write("checkpoints/00-00000010/manifest.json", content)
    assert command.start() == "trial-0000"
    trials = {trial.name: trial for trial in command.ledger.trials()}
    assert trials["trial-0004"].past[0].name == "trial-0001"
    assert trials["trial-0003"].status == "failed", "what became of it stays known"
    population_ = members(command.ledger.trials(), command.ledger.generations())
    assert [trial.name for trial in population_] == ["trial-0000", "trial-0001", "trial-0002", "trial-0004"]


def test_the_best_of_a_population_is_a_schedule_that_best_yaml_repeats(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, space={"losses.global_contrastive": {"log_uniform": [0.01, 1]}, "optim.lr": SPACE["optim.lr"]})
    sweep = sweep.model_copy(
        update={"config": sweep.config.model_copy(update={"same_sum": ("losses.global_contrastive", "losses.language_model")})}
    )
    ledger = Ledger(sweep)
    points = [{"losses.global_contrastive": weight, "optim.lr": rate} for weight, rate in ((0.1, 1e-3), (0.2, 2e-3), (0.3, 3e-3))]
    ledger.write(waiting(0, 2.0, 30, status="finished", point=points[0]))
    ledger.write(waiting(1, 3.0, 10, status="pruned", point=points[1]))
    past = [Past(name="trial-0000", point=points[0], until_step=10), Past(name="trial-0001", point=points[1], until_step=20)]
    best = waiting(2, 1.0, 30, status="finished", point=points[2], past=past)
    ledger.write(best)
    results = write_results(ledger, tmp_path / "out")
    config = load_config(results.best_yaml)
    assert config.run.changes == trial_config(sweep, best).run.changes
    drawn = [(leg.config.optim.lr, leg.config.losses.global_contrastive / leg.config.losses.language_model) for leg in legs(config)]
    assert [leg.until_step for leg in legs(config)] == [10, 20, None]
    assert np.allclose(drawn, [(1e-3, 0.1), (2e-3, 0.2), (3e-3, 0.3)])
    sums = [leg.config.losses.global_contrastive + leg.config.losses.language_model for leg in legs(config)]
    assert np.allclose(sums, 1.15)
    assert [part["after_steps"] for part in results.table["best_schedule"]] == [0, 10, 20]
    assert "trial-0000 from step 0, trial-0001 from step 10, trial-0002 from step 20" in results.text
    assert "It is a schedule" in results.page.read_text()
    # 30 and 10 steps, the copy's own 10, and the best once more from its start.
    assert results.table["cost_steps"]["best"] == 30 + 10 + 10 + 30
    assert best_so_far(ledger.trials(), "total", "min") == [(30, 2.0), (40, 2.0), (50, 1.0)]
    assert [(row["copy_of"], row["copied_at"]) for row in results.table["trials"]] == [(None, 0), (None, 0), ("trial-0001", 20)]
