"""`ssacl checkpoint import|export|show`: the released checkpoint's layout <-> ours, and what a model folder holds."""

from __future__ import annotations

import argparse

from ssacl.commands.later import Commands, not_built


def add_parsers(commands: Commands) -> None:
    actions = commands.add_parser("checkpoint", help="convert and inspect checkpoints").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    not_built(actions, "import", "the released layout -> our model folder")
    not_built(actions, "export", "our model folder -> the released layout")
    show = actions.add_parser("show", help="print what a model folder holds: version, metrics, provenance")
    show.add_argument("checkpoint", metavar="URL")
    show.set_defaults(run=_show)


def _show(options: argparse.Namespace) -> int:
    import json

    from ssacl.training.checkpoint import open_model

    print(json.dumps(open_model(options.checkpoint).manifest, indent=2))
    return 0
