"""`ssacl train`: the stages of a configuration under Ray Train, locally or on a cluster."""

from __future__ import annotations

import argparse

from ssacl.commands import Commands


def add_parsers(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train by a configuration (Ray Train, DeepSpeed)",
        description="Run the stages of a configuration. The same run.name on the same run.storage_url goes on where it stopped.",
        epilog="example: ssacl train --config configs/phantom_tiny.yaml data.url=s3://bucket/phantom run.num_train_workers=2",
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="a file of configs/, or your own")
    parser.add_argument("--address", metavar="HOST:PORT", help="join this Ray cluster instead of starting one here")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration, sizes, memory and steps; start nothing")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in optim.lr=1e-4")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ssacl.config import load_config

    config = load_config(options.config, options.overrides)
    if options.dry_run:
        from ssacl.training.dry_run import dry_run

        workers = config.run.num_train_workers
        print(dry_run(config, workers if isinstance(workers, int) else workers[1]), end="")
        return 0
    from ray_jobs.train import run_training

    result = run_training(config, progress=True, address=options.address)
    print(f"model: {result.model_url}")
    return 0
