"""Is a sweep worth its cost? Short phantom runs: TPE with ASHA against random draws that train to the end, from the same seeds.

    python -m benchmarks.sweep --work DIR [--trials 12] [--seed 0]

Each arm is what `ssacl tune` runs; the same folder goes on where it stood, and a phantom data set that is there is taken. Random draws
get the train time that the first arm took; `results/best_so_far.png` shows both. The stability check says whether the best, and learned
weighting, are better than the base with seeds that no search saw.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.phantom_data import add_work_arguments, phantom_data, work_folder
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from ray_jobs.train import run_training
from ray_jobs.tune import run_sweep
from ssacl.config import load_config
from ssacl.evaluation.quick import anatomy_pointing
from ssacl.sweeps.config import POINTING, Sweep, load_sweep
from ssacl.sweeps.results import Results

CONFIG = REPOSITORY / "configs" / "tune_loss_weights.yaml"
SMALL = ("model.vision.image_size_px=64", "engine.micro_batch_size=8")
"""A quarter of phantom_small's cost per step."""
STAGES = (
    "run.stages=[{{kind: contrastive, num_steps: {0}}}, {{kind: text, num_steps: {1}, lr: 2.5e-3}}, "
    "{{kind: findings, num_steps: {2}, lr: 4.0e-3}}, {{kind: generation, num_steps: {3}, lr: 1.5e-3, freeze_encoder: true}}]"
)
STEPS, QUICK_STEPS = (240, 360, 720, 80), (12, 6, 6, 6)
"""Of each stage. The last three are cheap; with fewer, no trial's reports state anything that is in the film."""
QUICK_TRIALS = 4
NUM_FILMS, NUM_TEST_FILMS = 16, 48
OBJECTIVES = {"findings_f1": "max", POINTING: "max"}
RANDOM = {"searcher.kind": "random", "scheduler.kind": "none", "stability.seeds": 0}
GOALS = {"tpe_asha.minutes": Goal(max=30.0), "tpe_asha.pruned_share": Goal(min=1 / 3), "best_yaml_difference": Goal(max=1e-6)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_work_arguments(parser)
    parser.add_argument("--trials", type=int, default=12, help=f"of TPE with ASHA; quick: at most {QUICK_TRIALS}")


def measure(options: argparse.Namespace) -> Measurement:
    """Run both arms, then train `best.yaml` again.

    Raises
    ------
    TrainingError
        All trials of an arm fail.
    """
    data_url, truth = phantom_data(options)
    work = work_folder(options)
    steps = QUICK_STEPS if options.quick else STEPS
    trials = min(options.trials, QUICK_TRIALS) if options.quick else options.trials

    def run(name: str, num_trials: int, changes: dict[str, Any]) -> Results:
        sweep = _sweep(name, data_url, truth, work, steps, options.seed, {"budget.trials": num_trials, **changes})
        return run_sweep(sweep, out_folder=work / "results" / name)

    found = {"tpe_asha": run("tpe_asha", trials, {"stability.seeds": 1} if options.quick else {})}
    # The first trial is the base, trained to its end.
    one = found["tpe_asha"].table["trials"][0]["minutes"]
    num_random = min(2 * trials, max(2, math.ceil(_spent(found["tpe_asha"]) / max(one, 0.01))))
    found["random"] = run("random", num_random, RANDOM)
    curves = {name: best_by_minutes(results) for name, results in found.items()}
    equal = min(_spent(results) for results in found.values())
    figures: dict[str, Any] = {name: _arm(results) | _at(curves[name], equal) for name, results in found.items()}
    figures["equal_minutes"] = round(equal, 2)
    figures["best_yaml_difference"] = _retrained(found["tpe_asha"], truth, work)
    _draw(curves, equal, work / "results" / "best_so_far.png")
    config = {"config": CONFIG.name, "small": SMALL, "stages": steps, "trials": {"tpe_asha": trials, "random": num_random}}
    return Measurement(figures=figures, goals=GOALS, config=config | {"seed": options.seed}, n=trials + num_random)


def _sweep(name: str, data_url: str, truth: Path, work: Path, steps: tuple[int, ...], seed: int, changes: dict[str, Any]) -> Sweep:
    first = steps[0] // 2
    overrides = [
        *(*SMALL, f"data.url={data_url}", STAGES.format(*steps), "run.asynchronous_checkpoints=false"),
        *(f"run.checkpoint_every_steps={first}", f"run.validate_every_steps={first}", f"run.seed={seed}"),
    ]
    return load_sweep(
        CONFIG,
        overrides,
        {
            **{"name": name, "storage_url": str(work / "sweeps"), "seed": seed, "objectives": OBJECTIVES, "truth": str(truth)},
            **{"num_films": NUM_FILMS, "searcher.num_random": max(2, changes["budget.trials"] // 3)},
            **{"stability.num_test_films": NUM_TEST_FILMS, "scheduler.first_rung_steps": first, "scheduler.factor": 2.0},
            **changes,
        },
    )


def _spent(results: Results) -> float:
    return float(sum(row["minutes"] for row in results.table["trials"]))


def best_by_minutes(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Objective -> (minutes that all trials up to here trained, best value of the finished ones so far), in the order of the trials."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name in results.table["objectives"]:
        spent, best, curve = 0.0, -math.inf, []
        for row in results.table["trials"]:
            spent += row["minutes"]
            value = row["objectives"][name]
            if row["status"] == "finished" and value is not None:
                best = max(best, value)
            if best > -math.inf:
                curve.append((round(spent, 2), best))
        curves[name] = curve
    return curves


def _at(curves: dict[str, list[tuple[float, float]]], minutes: float) -> dict[str, Any]:
    values = {name: max((best for at, best in curve if at <= minutes + 1e-9), default=None) for name, curve in curves.items()}
    return {"best_by_minutes": curves, "at_equal_minutes": values}


def _arm(results: Results) -> dict[str, Any]:
    table = results.table
    trials = table["trials"]
    return {
        "minutes": round(60 * table["hours"], 2),
        "train_minutes": round(_spent(results), 2),
        "steps": sum(row["steps"] for row in trials),
        "pruned_share": round(sum(row["status"] == "pruned" for row in trials) / len(trials), 4),
        "base": trials[0]["objectives"],
        "best": next(row["objectives"] for row in trials if row["name"] == table["best"]),
        "stability": table["stability"],
        "cost_steps": table["cost_steps"],
    }


def _retrained(results: Results, truth: Path, work: Path) -> float:
    """Largest difference of an objective between the best trial and `best.yaml` trained by itself."""
    config = load_config(results.best_yaml, [f"run.storage_url={work / 'runs'}"])
    again = run_training(config, out_folder=work / "results" / "best")
    values = {name: value for record in again.metrics for name, value in record.get("figures", {}).items()}
    values[POINTING] = anatomy_pointing(again.model_url, config.data.url, str(truth), NUM_FILMS)
    row = next(row for row in results.table["trials"] if row["name"] == results.table["best"])
    return float(max(abs(values[name] - value) for name, value in row["objectives"].items()))


def _draw(curves: dict[str, dict[str, list[tuple[float, float]]]], equal: float, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, name in zip(figure.subplots(1, len(OBJECTIVES)), OBJECTIVES, strict=True):
        for arm, colour in (("tpe_asha", "#109618"), ("random", "#3366cc")):
            points = curves[arm][name]
            panel.step([at for at, _ in points], [best for _, best in points], where="post", color=colour, marker=".", label=arm)
        panel.axvline(equal, color="#b8bec6", linewidth=0.8)
        panel.set_title(f"best {name.replace('_', ' ')} so far", fontsize=10)
        panel.set_xlabel("minutes of training, all trials", fontsize=8)
        panel.legend(fontsize=8, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    raise SystemExit(run_benchmark("sweep", measure, add_arguments, description=__doc__))
