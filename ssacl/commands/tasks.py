"""What the commands of downstream tasks share: options on films that were trained on, a progress bar, and the printed card."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_trained_films(parser: argparse.ArgumentParser, films: str = "test films") -> None:
    """Options on films that the checkpoint was trained on; `films` says which are looked at."""
    parser.add_argument("--trained-on", default="", metavar="URL", help="the checkpoint's data set, if it is not where its config says")
    parser.add_argument(
        "--trained-films",
        default="refuse",
        choices=("refuse", "leave-out", "mark"),
        help=f"{films} of the checkpoint's training split: refuse them (default), leave them out, or score them and say so on the card",
    )


def add_leave_out_bad(parser: argparse.ArgumentParser) -> None:
    """What becomes of films and annotations that cannot be used."""
    parser.add_argument("--leave-out-bad", action="store_true", help="leave out and count what cannot be used, instead of refusing")


def names(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated option."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def run_task(name: str, task: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> int:
    """Run `task(*arguments, **options, start=, progress=)` behind a bar of films, print its card; the exit status."""
    from ssacl.evaluation.downstream.task_card import print_task_card
    from ssacl.progress import ProgressBar

    with ProgressBar(name, total=None, unit="films") as bar:
        card = task(*arguments, **options, start=bar.set_total, progress=bar.advance)
    print_task_card(card)
    return 0
