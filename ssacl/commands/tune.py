"""`ssacl tune`: a sweep over training runs with Ray Tune, locally or on a cluster."""

from __future__ import annotations

import argparse

from ssacl.commands import Commands


def add_parsers(commands: Commands) -> None:
    parser = commands.add_parser(
        "tune",
        help="search loss weights and other settings (Ray Tune)",
        description="Run a sweep: many training runs, the bad ones stopped early, then a check with other seeds. The same name on the same "
        "storage goes on where it stopped.",
        epilog="example: ssacl tune --config configs/tune_loss_weights.yaml --trials 12 data.url=phantom_shards",
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="a sweep, as configs/tune_loss_weights.yaml")
    parser.add_argument("--trials", type=int, metavar="N", help="budget: trials of the search, in all")
    parser.add_argument("--hours", type=float, metavar="H", help="budget: hours of the search, in all")
    parser.add_argument("--gpu-hours", type=float, metavar="H", help="budget: GPUs times hours of the search, in all")
    parser.add_argument("--max-concurrent", type=int, metavar="N", help="trials at a time, at most")
    parser.add_argument("--name", help="the sweep's name")
    parser.add_argument("--storage", metavar="URL", help="folder or s3:// prefix for ledger, runs and results")
    parser.add_argument("--registry", metavar="URL", help="model registry in which the best model becomes a version")
    parser.add_argument("--address", metavar="HOST:PORT", help="join this Ray cluster instead of starting one here")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the training configuration, as in optim.lr=1e-4")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ssacl.sweeps.config import load_sweep

    changes = {
        "budget.trials": options.trials,
        "budget.hours": options.hours,
        "budget.gpu_hours": options.gpu_hours,
        "max_concurrent": options.max_concurrent,
        "name": options.name,
        "storage_url": options.storage,
        "registry_url": options.registry,
    }
    sweep = load_sweep(options.config, options.overrides, changes)
    from ray_jobs.tune import run_sweep

    results = run_sweep(sweep, address=options.address)
    print(results.text)
    print(f"best: {results.best_yaml} (ssacl train --config {results.best_yaml})\nmodel: {results.table['best_model']}")
    if results.table["registered"]:
        print(f"registered: {results.table['registered']}")
    print(f"page: {results.page}")
    return 0
