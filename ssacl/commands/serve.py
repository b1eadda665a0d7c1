"""`ssacl serve`: the report endpoint on Ray Serve."""

from __future__ import annotations

import argparse
import os

from ssacl.commands import Commands


def add_parsers(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve draft reports over HTTP (Ray Serve)",
        description="POST /v1/reports takes DICOM, PNG or JPEG and returns a draft report with evidence. Stop it with Ctrl-C.",
        epilog="then: curl -F file=@FILM.dcm http://127.0.0.1:8000/v1/reports",
    )
    parser.add_argument("--checkpoint", required=True, metavar="URL", help="model folder, or s3:// prefix of one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-replicas", type=int, default=1, help="model replicas to scale up to")
    parser.add_argument("--keys", metavar="FILE", help="API keys (`ssacl access add`); needed where other machines can reach the address")
    parser.add_argument("--insecure", action="store_true", help="serve other machines though nobody is asked who they are")
    parser.add_argument("--audit", metavar="FILE", help="append a FHIR AuditEvent for every request")
    parser.add_argument("--keep", metavar="URL", help="folder or s3:// prefix for answers that are fetched later (Prefer: respond-async)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from serve.app import run_server
    from serve.settings import ServeSettings

    access = {"keys_file": _absolute(options.keys), "insecure": options.insecure}
    service = {"access": access, "audit_file": _absolute(options.audit), "kept": {"url": _absolute(options.keep)}}
    settings = {"checkpoint_url": options.checkpoint, "host": options.host, "port": options.port, "max_replicas": options.max_replicas}
    run_server(ServeSettings.parse(settings | {"service": service}), blocking=True)
    return 0


def _absolute(place: str | None) -> str | None:
    """Replicas run in other folders."""
    return place if place is None or "://" in place else os.path.abspath(place)
