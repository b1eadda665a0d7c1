"""`ssacl access`: API keys of the endpoint."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ssacl.commands import Commands
from ssacl.errors import ConfigError

MAX_DAYS = 3650


def add_parsers(commands: Commands) -> None:
    parser = commands.add_parser(
        "access",
        help="make and withdraw API keys of the endpoint",
        description="A file of names, hashes and scopes, for `ssacl serve --keys FILE`. A key is shown once, when it is made.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="make a key and print it", epilog="then: curl -H 'Authorization: Bearer KEY' ...")
    add.add_argument("--keys", required=True, type=Path, metavar="FILE", help="made where it is not there")
    add.add_argument("--name", required=True, help="who gets it; stands in the audit log")
    add.add_argument("--scope", required=True, action="append", help="reports:write, reports:read, models:read or metrics:read; repeat it")
    add.add_argument("--days", type=float, help=f"valid for so long, at most {MAX_DAYS} (default: until it is revoked)")
    add.set_defaults(run=_add)
    revoke = actions.add_parser("revoke", help="withdraw a key; a running endpoint heeds it at once")
    revoke.add_argument("--keys", required=True, type=Path, metavar="FILE")
    revoke.add_argument("--name", required=True)
    revoke.set_defaults(run=_revoke)


def _add(options: argparse.Namespace) -> int:
    from serve.access_keys import add_key

    if options.days is not None and not 0 < options.days <= MAX_DAYS:
        raise ConfigError(
            f"--days must be above 0 and at most {MAX_DAYS} (got {options.days:g}). Leave it out for a key that does not end."
        )
    expires = datetime.now(UTC) + timedelta(days=options.days) if options.days else None
    print(add_key(options.keys, options.name, options.scope, expires))
    return 0


def _revoke(options: argparse.Namespace) -> int:
    from serve.access_keys import revoke_key

    revoke_key(options.keys, options.name)
    return 0
