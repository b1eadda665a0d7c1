"""Subcommands that a later release builds: they are in the tree, say so and exit 2."""

from __future__ import annotations

import argparse
from typing import TypeAlias

from ssacl.errors import NotBuiltError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def not_built(commands: Commands, name: str, what: str) -> None:
    """Add a subcommand that only says that it is not built yet."""
    parser = commands.add_parser(name, help=f"{what} (not built yet)", description=f"{what}. Not built yet.")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=lambda options: _refuse(name, what), takes_anything=True)


def _refuse(name: str, what: str) -> int:
    raise NotBuiltError(f"'{name}' is not built yet ({what}). docs/ARCHITECTURE.md says what works today.")


def add_parsers(commands: Commands) -> None:
    model = commands.add_parser("model", help="the model registry").add_subparsers(dest="action", required=True, metavar="ACTION")
    not_built(model, "list", "list the model versions in object storage")
    not_built(model, "promote", "point a channel to a version")
    not_built(model, "rollback", "point a channel back to its previous version")
