"""`ssacl evaluate retrieval` and `zero-shot`: films and texts in the space in which they were contrasted."""

from __future__ import annotations

import argparse
from typing import Any

from ssacl.commands import Commands
from ssacl.commands.tasks import add_trained_films, names, run_task

RETRIEVAL_EXAMPLES = """\
  ssacl evaluate retrieval --checkpoint C --data shards --out scores

R@1, 5 and 10 from film to report and back, and the precision of the films nearest to a finding's sentences (as on CheXpert 5x200).
"""
ZERO_SHOT_EXAMPLES = """\
  ssacl evaluate zero-shot --checkpoint C --data shards --out scores

The prompt file has, for every finding, sentences that say it and sentences that deny it.
"""


def add_parsers(tasks: Commands) -> None:
    """Add both to the tasks of `ssacl evaluate`."""
    retrieval = _parser(tasks, "retrieval", "film to report, report to film, and finding to films", RETRIEVAL_EXAMPLES)
    retrieval.add_argument("--classes", dest="findings", default="", metavar="NAMES", help="comma-separated; CheXpert's five if not given")
    retrieval.add_argument("--per-class", type=int, default=200, help="films of a class at most (%(default)s)")
    retrieval.set_defaults(run=_retrieval)
    zero_shot = _parser(tasks, "zero-shot", "findings told by prompts alone", ZERO_SHOT_EXAMPLES)
    zero_shot.add_argument("--findings", default="", metavar="NAMES", help="comma-separated; all that have prompts if not given")
    zero_shot.set_defaults(run=_zero_shot)


def _parser(tasks: Commands, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    parser = tasks.add_parser(name, help=what, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="URL", help="model folder, or s3:// prefix of one")
    parser.add_argument("--data", required=True, metavar="URL", help="ingested data set")
    parser.add_argument("--out", required=True, metavar="DIR", help="the same command again goes on where it stopped")
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--prompts", default="configs/zero_shot.yaml", metavar="FILE", help="prompt file (%(default)s)")
    parser.add_argument("--uncertain", choices=("present", "absent", "ignore"), help="of labels; the checkpoint's policy if not given")
    parser.add_argument("--limit", type=int, help="first films only")
    parser.add_argument("--seed", type=int, default=0, help="of resamples and draws")
    add_trained_films(parser)
    return parser


def _retrieval(options: argparse.Namespace) -> int:
    from ssacl.evaluation.downstream.retrieval import retrieval

    return _run("evaluate retrieval", retrieval, options, per_class=options.per_class)


def _zero_shot(options: argparse.Namespace) -> int:
    from ssacl.evaluation.downstream.zero_shot import zero_shot

    return _run("evaluate zero-shot", zero_shot, options)


def _run(name: str, task: Any, options: argparse.Namespace, **more: Any) -> int:
    from ssacl.evaluation.downstream.contrast_run import ContrastOptions

    chosen = ContrastOptions(
        split=options.split,
        findings=names(options.findings),
        uncertain=options.uncertain,
        limit=options.limit,
        seed=options.seed,
        trained_films=options.trained_films,
        trained_on=options.trained_on,
    )
    return run_task(name, task, options.checkpoint, options.data, options.out, options.prompts, chosen, **more)
