"""Sweeps without Ray: space, ledger, search, front, stability and results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats
from sweep_files import sweep_tree

from ssacl.config import Config, load_config, parse_config
from ssacl.data.storage import open_storage
from ssacl.errors import CheckpointError, ConfigError, StorageError
from ssacl.registry.channels import channel_names
from ssacl.registry.versions import open_version, version_names
from ssacl.sweeps.config import Budget, SweepConfig, checked_sweep, load_sweep
from ssacl.sweeps.front import best_so_far, best_trial, pareto_front
from ssacl.sweeps.importance import importance
from ssacl.sweeps.ledger import Ledger, Trial, trial_config
from ssacl.sweeps.results import BEST_MODEL, export_best, register_best, write_results
from ssacl.sweeps.search import propose
from ssacl.sweeps.space import look_up, with_values
from ssacl.sweeps.stability import compare_runs, mean_interval
from ssacl.training.sealed import download_folder, seal, upload_folder

BOTH = {"findings_f1": "max", "mirror_agreement": "max"}


def make_sweep(folder: Path, **changes: Any):
    tree = sweep_tree(folder) | {"base": {}} | changes
    return checked_sweep(SweepConfig.model_validate(tree), Config())


def trial(number: int, f1: float | None, agreement: float | None = None, status: str = "finished", **point: Any) -> Trial:
    figures = {"findings_f1": f1, "mirror_agreement": agreement}
    record = {"step": 10, "stage": "joint", "last": True, **{name: value for name, value in figures.items() if value is not None}}
    drawn = {"losses.global_contrastive": 0.1, "losses.anatomy_reconstruction": 1.0, "optim.lr": 1e-3, "losses.balance": "fixed"} | point
    return Trial(name=f"trial-{number:04d}", point=drawn, seed=0, status=status, curve=[record])


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "search space is empty"),
        ({"losses.contrast": {"uniform": [0, 1]}}, "no 'contrast' there. Known keys there: image_reconstruction"),
        (
            {"losses.mask_ratio": {"uniform": [0.2, 1.5]}},
            "'losses.mask_ratio' a value that it cannot take: losses.mask_ratio: Input should be less",
        ),
        ({"losses.mask_ratio": {"uniform": [0.6, 0.2]}}, "needs LOW < HIGH, not [0.6, 0.2]"),
        ({"optim.lr": {"log_uniform": [0, 1]}}, "needs LOW > 0"),
        ({"optim.lr": {"uniform": [0.1, 1], "choice": [1, 2]}}, "exactly one of"),
        ({"losses.balance": {"choice": ["fixed"]}}, "two or more different values"),
        ({"losses": {"choice": [1, 2]}}, "is a section, not a key"),
        ({"run.seed": {"choice": [1, 2]}}, "cannot be searched"),
        ({"optim.lr": {"normal": [0, 1]}}, "unknown key 'space.optim.lr.normal'"),
    ],
)
def test_a_space_that_says_nothing_sensible_is_refused(tmp_path: Path, space: dict[str, Any], said: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"space": space}))
    with pytest.raises(ConfigError) as raised:
        load_sweep(path)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": {}}, "no objective"),
        ({"same_sum": ["losses.balance"]}, "only numbers above 0"),
        ({"budget": {"gpu_hours": 1}}, "run.use_gpu is false"),
        ({"objectives": {"anatomy_pointing": "max"}}, "needs masks: give truth"),
        ({"objectives": {"anatomy_pointing": "max"}, "truth": "t", "scheduler": {}}, "name another scheduler.metric"),
        (
            {"space": {"losses.mask_ratio": {"uniform": [0.1, 0.2]}, "losses.global_contrastive": {"uniform": [0, 1]}}}
            | {"same_sum": ["losses.global_contrastive"]},
            "must be a number above 0",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_sweep(tmp_path, **changes)


def test_weights_of_one_sum_keep_it_and_their_ratios() -> None:
    same = ("losses.global_contrastive", "losses.language_model", "losses.image_reconstruction")
    values = {"losses.global_contrastive": 0.6, "losses.language_model": 1.2}
    config = with_values(Config(), values, same)
    drawn = [look_up(config, key) for key in same]
    assert math.isclose(sum(drawn), 0.15 + 1 + 1)
    assert math.isclose(drawn[1] / drawn[0], 2.0)
    assert math.isclose(drawn[2] / drawn[1], 1 / 1.2)
    assert with_values(Config(), {}, same) == Config()


def test_proposals_lie_in_the_space_and_depend_on_nothing_but_the_ledger(tmp_path: Path) -> None:
    config = make_sweep(tmp_path).config
    known = [trial(0, 0.1, 0.5)]
    for number in range(1, 9):
        point = propose(config, known, number)
        assert point == propose(config, list(known), number)
        assert all(domain.contains(point[key]) for key, domain in config.space.items())
        known.append(trial(number, 1 - abs(math.log10(point["optim.lr"]) + 3), 0.5, "pruned" if number == 3 else "finished", **point))
    drawn = {round(each.point["optim.lr"], 12) for each in known}
    assert len(drawn) == len(known), "no point is drawn twice"


def test_tpe_finds_what_random_draws_do_not(tmp_path: Path) -> None:
    def reached(kind: str, seed: int) -> float:
        config = make_sweep(tmp_path, searcher={"kind": kind, "num_random": 6}, seed=seed, objectives={"findings_f1": "max"}).config
        known: list[Trial] = []
        for number in range(24):
            point = propose(config, known, number)
            worth = -abs(math.log10(point["optim.lr"]) + 3.7) - abs(math.log10(point["losses.global_contrastive"]) + 0.4)
            known.append(trial(number, worth, **point))
        return max(each.value("findings_f1") or -9.0 for each in known)

    gains = [reached("tpe", seed) - reached("random", seed) for seed in range(4)]
    assert np.mean(gains) > 0.02


def test_the_front_is_what_a_plain_look_at_all_pairs_gives() -> None:
    rng = np.random.default_rng(0)
    trials = [trial(number, *rng.integers(0, 6, 2).astype(float)) for number in range(40)] + [
        trial(40, 9.0, None),
        trial(41, 9, 9, "pruned"),
    ]
    front = pareto_front(trials, {"findings_f1": "max", "mirror_agreement": "min"})
    places = {each.name: (each.value("findings_f1"), each.value("mirror_agreement")) for each in trials[:40]}
    expected = [
        name for name, (up, down) in places.items() if not any(a >= up and b <= down and (a, b) != (up, down) for a, b in places.values())
    ]
    assert [each.name for each in front] == expected
    best = best_trial([trial(0, 0.9, 0.1), trial(1, 0.8, 0.8), trial(2, 0.1, 0.9), trial(3, 0.0, 0.0)], BOTH)
    assert best is not None
    assert best.name == "trial-0001"
    assert best_trial([trial(0, 0.9, None), trial(1, 0.5, 0.5, "failed")], BOTH) is None


def test_best_so_far_counts_the_steps_of_pruned_trials() -> None:
    trials = [trial(0, 0.2), trial(1, 0.9, status="pruned"), trial(2, 0.5), trial(3, 0.4)]
    assert best_so_far(trials, "findings_f1", "max") == [(10, 0.2), (20, 0.2), (30, 0.5), (40, 0.5)]


def test_importance_is_the_squared_rank_correlation(tmp_path: Path) -> None:
    config = make_sweep(tmp_path).config
    rates, contrasts = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3], [0.5, 0.1, 0.3, 0.02, 0.9]
    balances = ["fixed", "fixed", "fixed", "uncertainty", "uncertainty"]
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    trials = [
        trial(
            number,
            values[number],
            **{"optim.lr": rates[number], "losses.global_contrastive": contrasts[number], "losses.balance": balances[number]},
        )
        for number in range(5)
    ]
    shares = importance(config, trials, "findings_f1")
    assert math.isclose(shares["optim.lr"], 1.0)
    assert math.isclose(shares["losses.global_contrastive"], stats.spearmanr(contrasts, values).statistic ** 2)
    # Between-group share of the ranks' variance: means 2, 2, 2, 4.5, 4.5 around 3.
    assert math.isclose(shares["losses.balance"], (3 * 1 + 2 * 2.25) / 10)
    assert shares["losses.anatomy_reconstruction"] == 0.0
    assert importance(config, trials[:3], "findings_f1") == {}


def seed_run(kind: str, seed: int, status: str = "finished") -> Trial:
    return Trial(name=f"{kind}-seed-{seed}", kind=kind, seed=seed, status=status)


def test_intervals_are_students_and_differences_are_taken_seed_by_seed() -> None:
    values = [0.5, 0.7, 0.9]
    low, high = stats.t.interval(0.95, 2, loc=0.7, scale=stats.sem(values))
    assert mean_interval(values)["interval"] == pytest.approx([low, high])
    assert mean_interval([0.5])["interval"] is None
    runs = [(seed_run("base", seed), base) for seed, base in ((1, 0.1), (2, 0.5), (3, 0.9), (4, 0.7))]
    runs += [(seed_run("best", seed), best) for seed, best in ((1, 0.2), (2, 0.61), (3, 0.99))] + [(seed_run("best", 4, "failed"), 9.0)]
    compared = compare_runs(runs, "best", "findings_f1", "max")
    assert compared["seeds"] == [1, 2, 3]
    assert compared["difference"]["values"] == pytest.approx([0.1, 0.11, 0.09])
    assert compared["verdict"] == "the best is better"
    assert compare_runs(runs, "best", "total", "min")["verdict"] == "the best is worse"
    noisy = compare_runs([(run, value + (0.3 if run.name == "best-seed-1" else 0.0)) for run, value in runs], "best", "findings_f1", "max")
    assert noisy["verdict"] == "no difference beyond the seeds' spread (on average better)"
    assert compare_runs([], "best", "findings_f1", "max")["verdict"] == "not compared"


def test_a_ledger_keeps_trials_and_refuses_another_sweep(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    ledger = Ledger(sweep)
    ledger.claim()
    ledger.write(trial(0, 0.5))
    ledger.write(Trial(name="base-seed-1", kind="base", seed=1))
    again = Ledger(make_sweep(tmp_path, budget={"trials": 99}, stability={"seeds": 5}, max_concurrent=7))
    again.claim()
    assert again.trials() == [trial(0, 0.5)]
    assert [each.name for each in again.trials("best", "base")] == ["base-seed-1"]
    with pytest.raises(ConfigError, match="other settings: seed"):
        Ledger(make_sweep(tmp_path, seed=4)).claim()
    (tmp_path / "sweeps/tiny/trials/trial-0000.json").write_text('{"name": 1')
    with pytest.raises(StorageError, match="damaged"):
        again.trials()


def test_a_loser_keeps_its_metrics_only(tmp_path: Path) -> None:
    ledger = Ledger(make_sweep(tmp_path))
    run = ledger.storage.sub("runs/trial-0000")
    for key in ("checkpoints/00-00000002/manifest.json", "checkpoints/00-00000002/state.pt", "model/manifest.json", "metrics.jsonl"):
        run.write(key, b"{}")
    ledger.drop_run(trial(0, 0.5), keep_model=True)
    assert [item.key for item in run.list()] == ["metrics.jsonl", "model/manifest.json"]
    ledger.drop_run(trial(0, 0.5), keep_model=False)
    assert [item.key for item in run.list()] == ["metrics.jsonl"]


def test_the_best_model_is_copied_whole_and_a_new_best_takes_its_place(tmp_path: Path) -> None:
    ledger = Ledger(make_sweep(tmp_path, objectives={"findings_f1": "max"}))

    def finish(number: int, f1: float) -> None:
        ledger.write(trial(number, f1))
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        (folder / "weights").write_bytes(bytes([number]))
        seal(folder, {})
        upload_folder(folder, ledger.storage, f"runs/trial-{number:04d}/model")

    for number in (0, 1):
        finish(number, 0.5 + number)
        for _ in range(2):
            export_best(ledger)
            copied = download_folder(ledger.storage, BEST_MODEL, tmp_path / "copied")
            assert (copied / "weights").read_bytes() == bytes([number])
    ledger.storage.sub("runs/trial-0001/model").write("weights", b"other")
    ledger.storage.sub(BEST_MODEL).delete("manifest.json")
    with pytest.raises(CheckpointError, match="damaged"):
        export_best(ledger)


def test_the_best_model_is_registered_once_and_promoted_by_nobody(tmp_path: Path) -> None:
    ledger = Ledger(make_sweep(tmp_path, objectives={"findings_f1": "max"}, registry_url=str(tmp_path / "registry")))

    def finish(number: int, f1: float) -> None:
        ledger.write(trial(number, f1))
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        (folder / "weights").write_bytes(bytes([number]))
        seal(folder, {"model_version": f"weights-{number}", "metrics": {"validation": {"joint": {"total": 1.5}}}})
        upload_folder(folder, ledger.storage, f"runs/trial-{number:04d}/model")
        export_best(ledger)

    finish(0, 0.5)
    address = register_best(ledger)
    again = register_best(Ledger(make_sweep(tmp_path, objectives={"findings_f1": "max"}, registry_url=str(tmp_path / "registry"))))
    registry = open_storage(tmp_path / "registry")
    [name] = version_names(registry)
    assert address == again == f"{registry.url}@{name}"
    version = open_version(registry, name)
    search = {"sweep": "tiny", "trial": "trial-0000", "findings_f1": 0.5}
    assert version.record["metrics"] == {"validation": {"joint": {"total": 1.5}}, "search": search}
    assert "trial-0000" in version.card()
    assert version.check_files() == 1
    assert channel_names(registry) == []
    finish(1, 0.9)
    assert register_best(ledger) != address, "a sweep that went on and has another best"
    assert len(version_names(registry)) == 2
    results = write_results(ledger, tmp_path / "out", address)
    assert results.table["registered"] == address
    assert f"Registered as {address}" in results.page.read_text()
    assert register_best(Ledger(make_sweep(tmp_path, objectives={"findings_f1": "max"}))) == ""


def test_the_first_limit_that_is_reached_ends_a_search() -> None:
    budget = Budget(hours=2, gpu_hours=3)
    assert budget.spent(1.9, 2.9) == ""
    assert budget.spent(2.1, 0) == "the budget of 2 hours is spent"
    assert budget.spent(1.0, 3.1) == "the budget of 3 GPU-hours is spent"
    assert Budget().spent(1e6, 1e6) == ""


def test_a_share_of_a_gpu_is_for_runs_of_one_train_worker() -> None:
    config = parse_config({"run": {"use_gpu": True, "gpus_per_train_worker": 0.25}})
    assert config.run.gpus_per_train_worker == 0.25
    with pytest.raises(ConfigError, match="needs num_train_workers: 1"):
        parse_config({"run": {"gpus_per_train_worker": 0.5, "num_train_workers": 2}})


def test_results_are_whole_and_best_yaml_is_the_best_trials_configuration(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, same_sum=["losses.global_contrastive", "losses.anatomy_reconstruction"])
    ledger = Ledger(sweep)
    ledger.claim()
    draws = [(0.3, 0.5, 1e-3), (0.6, 0.8, 2e-3), (0.4, 0.9, 3e-3), (0.2, 0.2, 5e-3), (None, 0.4, 4e-3)]
    for number, (f1, agreement, rate) in enumerate(draws):
        ledger.write(trial(number, f1, agreement, "pruned" if f1 is None else "finished", **{"optim.lr": rate}))
    ledger.write(Trial(name="trial-0005", seed=0, status="failed", error="TrainingError: <not finite>", point=trial(0, 0.0).point))
    for seed in (1, 2):
        for kind, name in (("base", "base"), ("best", "trial-0001"), ("uncertainty", "uncertainty")):
            run = trial(0, 0.3 + 0.1 * (kind == "best") - 0.1 * (kind == "uncertainty") + 0.01 * seed, 0.5)
            ledger.write(run.model_copy(update={"name": f"{name}-seed-{seed}", "kind": kind, "seed": seed, "test": {"findings_f1": 0.2}}))
    ledger.write(Trial(name="base-seed-3", kind="base", seed=3, status="failed", error="StorageError: <full>"))
    results = write_results(ledger, tmp_path / "out")
    assert "base-seed-3 failed: StorageError: <full>" in results.text
    assert "StorageError: &lt;full&gt;" in results.page.read_text()
    assert "findings_f1, 2 seeds: base 0.315 [" in results.text
    assert "learned weighting 0.215 [" in results.text
    assert "learned weighting is worse" in results.text
    # Six trials of ten steps, the failed one without any, and the best once more; of the others one run.
    assert results.table["cost_steps"] == {"base": 10, "uncertainty": 10, "best": 60}
    assert results.table["best"] == "trial-0001"
    assert [row["name"] for row in results.table["trials"] if row["on_front"]] == ["trial-0001", "trial-0002"]
    best = load_config(results.best_yaml)
    expected = trial_config(sweep, ledger.read("trial-0001"))
    assert best.run.name == "tiny-best"
    assert best.model_copy(update={"run": expected.run}) == expected
    assert best.optim.lr == 2e-3
    assert best.run.num_figure_films == 2
    assert math.isclose(best.losses.global_contrastive + best.losses.anatomy_reconstruction, 1.15)
    page = results.page.read_text()
    assert "&lt;not finite&gt;" in page
    assert "the best is better" in page
    assert (tmp_path / "out/sweep.png").read_bytes()[:4] == b"\x89PNG"
    kept = {path.name for path in (tmp_path / "sweeps/tiny").iterdir()}
    assert {"best.yaml", "table.json", "table.txt", "sweep.png", "sweep.html"} <= kept
    assert json.loads((tmp_path / "out/table.json").read_text())["stability"]["test"][0]["verdict"].startswith("no difference")
    assert "trial-0001*" in results.text
