"""Is a sweep worth its cost? Short phantom runs: TPE with ASHA against random draws that train to the end, from the same seeds.

    python -m benchmarks.sweep --work DIR [--trials 12] [--seed 0]

Each arm is what `ssacl tune` runs; the same folder goes on where it stood. Compared is the best so far by optimizer steps spent, up to
what the cheaper arm spent. The stability check says whether the best is better than the base with seeds that no search saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.phantom_data import add_work_arguments, phantom_data, work_folder
from benchmarks.record import REPOSITORY, Goal, Measurement, run_benchmark
from ray_jobs.train import run_training
from ray_jobs.tune import run_sweep
from ssacl.config import load_config
from ssacl.sweeps.config import Sweep, load_sweep
from ssacl.sweeps.results import Results

CONFIG = REPOSITORY / "configs" / "tune_loss_weights.yaml"
STAGES = (
    "run.stages=[{{kind: contrastive, num_steps: {0}}}, {{kind: findings, num_steps: {0}, lr: 4.0e-3}}, "
    "{{kind: generation, num_steps: {1}, lr: 2.5e-3, freeze_encoder: true}}]"
)
STEPS, QUICK_STEPS = (180, 90), (12, 6)
"""Of the contrastive and the findings stage, and of the generation stage."""
GOALS = {"tpe_asha.minutes": Goal(max=30.0), "tpe_asha.pruned_share": Goal(min=1 / 3), "best_yaml_difference": Goal(max=1e-6)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_work_arguments(parser)
    parser.add_argument("--trials", type=int, default=12, help="of each arm")


def measure(options: argparse.Namespace) -> Measurement:
    """Run both arms, then train `best.yaml` again.

    Raises
    ------
    TrainingError
        All trials of an arm fail.
    """
    data_url, _ = phantom_data(options)
    work = work_folder(options)
    steps = QUICK_STEPS if options.quick else STEPS
    found, figures = {}, {}
    for name, changes in (("tpe_asha", {}), ("random", {"searcher.kind": "random", "scheduler.kind": "none", "stability.seeds": 0})):
        sweep = _sweep(name, data_url, work, steps, options, changes)
        found[name] = run_sweep(sweep, out_folder=work / "results" / name)
        figures[name] = _arm(found[name])
    spent = min(figures[name]["steps"] for name in found)
    for name, results in found.items():
        figures[name]["at_equal_steps"] = {
            metric: max((best for at, best in curve if at <= spent), default=None) for metric, curve in results.table["best_so_far"].items()
        }
    figures["best_yaml_difference"] = _retrained(found["tpe_asha"], work)
    config = {"config": CONFIG.name, "stages": steps, "trials": options.trials, "seed": options.seed}
    return Measurement(figures=figures, goals=GOALS, config=config, n=2 * options.trials)


def _sweep(name: str, data_url: str, work: Path, steps: tuple[int, int], options: argparse.Namespace, changes: dict[str, Any]) -> Sweep:
    first = steps[0] // 3
    overrides = [
        *(f"data.url={data_url}", STAGES.format(*steps), "run.asynchronous_checkpoints=false"),
        *(f"run.checkpoint_every_steps={first}", f"run.validate_every_steps={first}", f"run.seed={options.seed}"),
    ]
    return load_sweep(
        CONFIG,
        overrides,
        {
            **{"name": name, "storage_url": str(work / "sweeps"), "seed": options.seed, "budget.trials": options.trials},
            **{"num_films": 16, "searcher.num_random": max(2, options.trials // 3), "stability.num_test_films": 60},
            **{"scheduler.first_rung_steps": first, "scheduler.factor": 2.0, "max_concurrent": 2},
            **changes,
        },
    )


def _arm(results: Results) -> dict[str, Any]:
    table = results.table
    trials = table["trials"]
    return {
        "minutes": round(60 * table["hours"], 2),
        "steps": sum(row["steps"] for row in trials),
        "pruned_share": round(sum(row["status"] == "pruned" for row in trials) / len(trials), 4),
        "base": trials[0]["objectives"],
        "best": next(row["objectives"] for row in trials if row["name"] == table["best"]),
        "best_so_far": table["best_so_far"],
        "stability": table["stability"],
    }


def _retrained(results: Results, work: Path) -> float:
    """Largest difference of an objective between the best trial and `best.yaml` trained by itself."""
    config = load_config(results.best_yaml, [f"run.storage_url={work / 'runs'}"])
    metrics = run_training(config, out_folder=work / "results" / "best").metrics
    row = next(row for row in results.table["trials"] if row["name"] == results.table["best"])
    differences = []
    for name, value in row["objectives"].items():
        again = [record["figures"][name] for record in metrics if name in record.get("figures", {})]
        differences.append(abs(again[-1] - value))
    return float(max(differences))


if __name__ == "__main__":
    raise SystemExit(run_benchmark("sweep", measure, add_arguments, description=__doc__))
