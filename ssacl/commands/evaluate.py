"""`ssacl evaluate reports`: a checkpoint on a split it was not trained on; the other tasks come later."""

from __future__ import annotations

import argparse
from pathlib import Path

from ssacl.commands import evaluate_grounding
from ssacl.commands.later import Commands, not_built


def add_parsers(commands: Commands) -> None:
    tasks = commands.add_parser("evaluate", help="score a checkpoint").add_subparsers(dest="task", required=True, metavar="TASK")
    reports = tasks.add_parser(
        "reports",
        help="findings, report text and, where there is truth, anatomy maps of a checkpoint on a split",
        description="Every score stands beside its baseline. Writes DIR/scorecard.json and prints a table.",
    )
    reports.add_argument("--checkpoint", required=True, metavar="URL")
    reports.add_argument("--data", required=True, metavar="URL")
    reports.add_argument("--out", required=True, metavar="DIR")
    reports.add_argument("--split", default="test", choices=("val", "test"))
    reports.add_argument("--truth", metavar="DIR", help="measuring truth of a phantom data set (NAME_truth)")
    reports.add_argument("--limit", type=int, help="first studies only")
    reports.add_argument(
        "--chexbert", metavar="DIR", help="read findings of reports by the CheXbert in DIR (its weights, BERT's vocab.txt)"
    )
    reports.add_argument("--num-workers", type=int, default=1, help="parallel Ray actors; 1: in this process, without Ray")
    reports.set_defaults(run=_reports)
    evaluate_grounding.add_parser(tasks)
    not_built(tasks, "retrieval", "image-text retrieval")
    not_built(tasks, "zero-shot", "zero-shot classification")
    not_built(tasks, "compare", "two score cards side by side")


def _reports(options: argparse.Namespace) -> int:
    from ray_jobs.evaluate import run_evaluation

    run_evaluation(
        options.checkpoint,
        options.data,
        split=options.split,
        truth_folder=Path(options.truth) if options.truth else None,
        out_folder=Path(options.out),
        limit=options.limit,
        num_workers=options.num_workers,
        progress=True,
        chexbert_folder=Path(options.chexbert) if options.chexbert else None,
    )
    return 0
