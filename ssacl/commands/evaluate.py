"""`ssacl evaluate reports` and `compare`: a checkpoint on a split it was not trained on, or report pairs. Other tasks have own files."""

from __future__ import annotations

import argparse
from pathlib import Path

from ssacl.commands import Commands, evaluate_contrast, evaluate_grounding
from ssacl.errors import ConfigError

_OF_A_CHECKPOINT = ("truth", "limit", "num_workers")


def add_parsers(commands: Commands) -> None:
    tasks = commands.add_parser("evaluate", help="score a checkpoint, or reports of any system").add_subparsers(
        dest="task", required=True, metavar="TASK"
    )
    reports = tasks.add_parser(
        "reports",
        help="report text and findings of a checkpoint on a split, or of a file of report pairs",
        description="Give --pairs, or --checkpoint with --data. Writes DIR/scorecard.json and scorecard.html, prints a table; the same "
        "command again does what is missing.",
    )
    reports.add_argument("--pairs", metavar="FILE", help="JSON lines with id, prediction and reference")
    reports.add_argument("--checkpoint", metavar="URL")
    reports.add_argument("--data", metavar="URL", help="data set of the checkpoint; with --pairs: whose split the ids must be")
    reports.add_argument("--out", required=True, metavar="DIR")
    reports.add_argument("--split", choices=("val", "test"), help="test if not given")
    reports.add_argument("--truth", metavar="DIR", help="measuring truth of a phantom data set (NAME_truth)")
    reports.add_argument("--limit", type=int, help="first studies only")
    reports.add_argument(
        "--uncertain", choices=("present", "absent", "ignore"), help="with --pairs: what an uncertain finding counts as (present)"
    )
    reports.add_argument(
        "--chexbert", metavar="DIR", help="read findings of reports by the CheXbert in DIR too (its weights, BERT's vocab.txt)"
    )
    reports.add_argument("--meteor", action="store_true", help="METEOR too; needs Java")
    reports.add_argument("--num-workers", type=int, help="parallel Ray actors; 1 (if not given): in this process, without Ray")
    reports.set_defaults(run=_reports)
    compare = tasks.add_parser("compare", help="two report evaluations of the same cases side by side, with significance")
    compare.add_argument("a", metavar="A", help="folder that `evaluate reports` wrote")
    compare.add_argument("b", metavar="B")
    compare.add_argument("--out", required=True, metavar="DIR")
    compare.set_defaults(run=_compare)
    evaluate_grounding.add_parser(tasks)
    evaluate_contrast.add_parsers(tasks)


def _reports(options: argparse.Namespace) -> int:
    if (options.pairs is None) == (options.checkpoint is None):
        raise ConfigError("Give either --pairs FILE, or --checkpoint URL with --data URL: one of the two, not both.")
    return _checkpoint(options) if options.pairs is None else _pairs(options)


def _checkpoint(options: argparse.Namespace) -> int:
    if options.data is None:
        raise ConfigError("--checkpoint needs the data set to draft on: add --data URL.")
    if options.uncertain is not None:
        raise ConfigError("--uncertain goes with --pairs; a checkpoint brings its own policy (data.uncertain).")
    from ray_jobs.evaluate import run_evaluation

    run_evaluation(
        options.checkpoint,
        options.data,
        split=options.split or "test",
        truth_folder=Path(options.truth) if options.truth else None,
        out_folder=Path(options.out),
        limit=options.limit,
        num_workers=1 if options.num_workers is None else options.num_workers,
        progress=True,
        chexbert_folder=Path(options.chexbert) if options.chexbert else None,
        meteor=options.meteor,
    )
    return 0


def _pairs(options: argparse.Namespace) -> int:
    given = [f"--{name.replace('_', '-')}" for name in _OF_A_CHECKPOINT if getattr(options, name) is not None]
    if given:
        raise ConfigError(f"{', '.join(given)} goes with --checkpoint, not with --pairs.")
    from ssacl.evaluation.pairs_evaluation import evaluate_pairs
    from ssacl.evaluation.scorecard import print_card
    from ssacl.progress import ProgressBar

    with ProgressBar("evaluate", total=None, unit="pairs") as bar:
        card = evaluate_pairs(
            options.pairs,
            options.out,
            data_url=options.data,
            split=options.split,
            uncertain=options.uncertain or "present",
            chexbert_folder=options.chexbert,
            meteor=options.meteor,
            progress=bar.advance,
        )
    print_card(card)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from ssacl.evaluation.compare import compare, print_comparison
    from ssacl.evaluation.scorecard import MAIN_FIGURES

    print_comparison(compare(options.a, options.b, options.out), MAIN_FIGURES)
    return 0
