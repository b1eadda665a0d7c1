"""Runs that change settings half way: which can, legs, and that a change is the same whether the run was broken off there or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from training_set import tiny_config, write_training_set

from ssacl.config import Config, load_config, parse_config
from ssacl.data.storage import open_storage
from ssacl.errors import CheckpointError, ConfigError
from ssacl.training.checkpoint import load_model_folder
from ssacl.training.forks import fork_run
from ssacl.training.legs import legs, legs_left
from ssacl.training.loop import TrainingOutcome, train
from ssacl.training.reporter import LogReporter
from ssacl.training.resume import RunStore, run_storage
from ssacl.training.settings import run_settings

STAGES = [{"kind": "contrastive", "num_steps": 6}, {"kind": "findings", "num_steps": 2}, {"kind": "generation", "num_steps": 4}]
CHANGES = [
    {"after_steps": 4, "values": {"optim.lr": 0.01, "losses.global_contrastive": 0.9, "losses.grounding.centroid": 0.5}},
    {"after_steps": 10, "values": {"optim.lr": 0.0005}},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("set"))


def make(data: Path, runs: Path, changes: list[dict[str, Any]] | None = None, **run: Any) -> Config:
    return tiny_config(data, runs, run={"stages": STAGES, "changes": changes or [], "validate_every_steps": 3, **run})


def steps(outcome: TrainingOutcome) -> list[tuple[int, float, dict[str, float]]]:
    return [(record["run_step"], record["lr"], record["losses"]) for record in outcome.metrics if record["event"] == "step"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"after_steps": 4, "values": {"losses.initial_tau": 3.0}}], "'losses.initial_tau' cannot change half way: it is where a learned"),
        ([{"after_steps": 4, "values": {"model.vision.depth": 3}}], "it decides what the model is made of"),
        ([{"after_steps": 4, "values": {"losses.contrast": 3}}], "'losses.contrast' cannot change half way"),
        ([{"after_steps": 4, "values": {"optim.lr": -1.0}}], "optim.lr: Input should be greater than 0"),
        ([{"after_steps": 4, "values": {}}], "at least 1 item"),
        ([{"after_steps": 4, "values": {"optim.lr": 0.1}}] * 2, r"ascending numbers of steps, not \[4, 4\]"),
    ],
)
def test_a_change_that_cannot_be_is_refused_by_name(changes: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({"run": {"changes": changes}})


def test_legs_are_what_lies_between_changes() -> None:
    whole = load_config(
        None, ["run.changes=[{after_steps: 4, values: {optim.lr: 1e-2}}, {after_steps: 10, values: {losses.mask_ratio: 0.3}}]"]
    )
    found = [(leg.until_step, leg.config.optim.lr, leg.config.losses.mask_ratio) for leg in legs(whole)]
    assert found == [(4, 2.5e-4, 0.5), (10, 1e-2, 0.5), (None, 1e-2, 0.3)]
    assert [leg.until_step for leg in legs(whole, 10)] == [4, 10]
    assert [leg.until_step for leg in legs(whole, 7)] == [4, 7]
    assert [leg.until_step for leg in legs(whole, 20)] == [4, 10, 20]
    assert all(leg.whole == whole and not leg.config.run.changes for leg in legs(whole))
    assert "changes" not in run_settings(whole, 4)["run"], "the checkpoint of the step was written before it"
    assert [change["after_steps"] for change in run_settings(whole, 5)["run"]["changes"]] == [4]


def test_a_run_that_changes_goes_on_bit_for_bit_wherever_it_was_broken_off(data: Path, tmp_path: Path) -> None:
    whole = train(make(data, tmp_path / "whole", CHANGES), LogReporter())
    plain = train(make(data, tmp_path / "plain"), LogReporter())
    assert steps(whole)[:4] == steps(plain)[:4]
    assert steps(whole)[4][1] == pytest.approx(10 * steps(plain)[4][1]), "the rate is the new one, not the checkpoint's"
    assert [step for step, _, _ in steps(whole)] == list(range(1, 13))
    parts = make(data, tmp_path / "parts", CHANGES)
    for until in (3, 4, 6, 7, 9):
        ended = train(parts, LogReporter(), until_step=until)
        assert ended.manifest == {}
        assert steps(ended)[-1][0] == until
        assert max(record["run_step"] for record in ended.metrics if record["event"] == "validation") == until
    assert [leg.until_step for leg in legs_left(parts, 0)] == [10, None], "what is done is not done again"
    broken = train(parts, LogReporter(), until_step=99)
    assert steps(broken) == steps(whole)
    assert broken.manifest["model_version"] == whole.manifest["model_version"] != plain.manifest["model_version"]
    assert load_model_folder(tmp_path / "parts/tiny/model").config.run.changes == parts.run.changes


def test_what_a_run_has_changed_must_stay_and_what_it_will_change_is_free(data: Path, tmp_path: Path) -> None:
    train(make(data, tmp_path, CHANGES), LogReporter(), until_step=6)
    with pytest.raises(CheckpointError, match=r"other settings: run\.changes"):
        train(make(data, tmp_path, CHANGES[1:]), LogReporter())
    with pytest.raises(CheckpointError, match=r"run\.seed"):
        train(make(data, tmp_path, CHANGES, seed=5), LogReporter())
    later = [CHANGES[0], {"after_steps": 6, "values": {"losses.language_model": 2.0}}]
    assert train(make(data, tmp_path, later), LogReporter()).manifest["model_version"]


def test_a_fork_goes_on_from_a_copy_of_the_checkpoint_under_its_own_settings(data: Path, tmp_path: Path) -> None:
    donor, own = make(data, tmp_path), make(data, tmp_path, CHANGES[:1], name="fork")
    train(donor, LogReporter(), until_step=4)
    with pytest.raises(CheckpointError, match="no checkpoint after 5 optimizer steps"):
        fork_run(run_storage(donor), run_storage(own), 5)
    for _ in range(2):
        fork_run(run_storage(donor), run_storage(own), 4)
    found = RunStore(run_storage(own)).latest()
    assert found is not None
    assert found[1]["forked_from"] == run_storage(donor).url
    forked = train(own, LogReporter())
    train(donor, LogReporter())
    assert steps(forked) == steps(train(make(data, tmp_path, CHANGES[:1], name="alone"), LogReporter()))
    other = make(data, tmp_path, [{"after_steps": 3, "values": {"optim.lr": 0.5}}], name="other")
    fork_run(run_storage(own), run_storage(other), 11)
    with pytest.raises(CheckpointError, match=r"run\.changes"):
        train(other, LogReporter())
    assert not open_storage(tmp_path).sub("other").exists("model/manifest.json")


def _deepspeed(world_rank: int, world_size: int, data: Path, folder: Path) -> None:
    for zero_stage in (0, 2, 3):
        made = []
        for runs in ("whole", "parts"):
            config = make(data, folder / f"{runs}-{zero_stage}", CHANGES[:1], stages=STAGES[:1])
            engine = config.engine.model_copy(update={"kind": "deepspeed", "zero_stage": zero_stage})
            config = config.model_copy(update={"engine": engine})
            if runs == "parts":
                train(config, LogReporter(world_rank), world_rank, world_size, until_step=3)
            made.append(steps(train(config, LogReporter(world_rank), world_rank, world_size)))
        rates = [rate for _, rate, _ in made[0]]
        assert rates[4] > 4 * rates[3], "the rate is the new one, not the checkpoint's"
        assert made[1] == made[0], zero_stage


def test_deepspeed_changes_half_way_too(data: Path, tmp_path: Path) -> None:
    run_ranks(_deepspeed, 1, tmp_path / "ranks", data, tmp_path)
