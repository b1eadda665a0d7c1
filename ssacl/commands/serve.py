"""`ssacl serve`: the report endpoint on Ray Serve."""

from __future__ import annotations

import argparse

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
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from serve.app import run_server
    from serve.settings import ServeSettings

    settings = ServeSettings.parse(
        {"checkpoint_url": options.checkpoint, "host": options.host, "port": options.port, "max_replicas": options.max_replicas}
    )
    run_server(settings, blocking=True)
    return 0
