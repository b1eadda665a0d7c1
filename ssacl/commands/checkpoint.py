"""`ssacl checkpoint import|export|show`: the released checkpoint's layout <-> ours, and what a model folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ssacl.commands import Commands


def add_parsers(commands: Commands) -> None:
    actions = commands.add_parser("checkpoint", help="convert and inspect checkpoints").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    bring = actions.add_parser("import", help="the released layout -> our model folder, bit-exact")
    bring.add_argument("path", metavar="PATH", type=Path, help="the released .pth file")
    bring.add_argument("--tokenizer", metavar="JSON", type=Path, required=True, help="the text encoder's WordPiece (tokenizers JSON)")
    bring.add_argument(
        "--language-model", metavar="DIR", type=Path, help="GPT-2's config.json and tokenizer; without it, no text is written"
    )
    bring.add_argument("--config", metavar="YAML", type=Path, help="head counts (defaults 12/6/6/12) and settings of further training")
    bring.add_argument("--out", metavar="DIR", type=Path, required=True, help="the new model folder")
    bring.set_defaults(run=_import)
    export = actions.add_parser("export", help="our model folder -> the released layout")
    export.add_argument("checkpoint", metavar="DIR", help="model folder or s3:// address of wiring `official`")
    export.add_argument("--out", metavar="FILE.pth", type=Path, required=True, help="the new file")
    export.set_defaults(run=_export)
    show = actions.add_parser("show", help="print what a model folder holds: version, metrics, provenance")
    show.add_argument("checkpoint", metavar="URL")
    show.set_defaults(run=_show)


def _import(options: argparse.Namespace) -> int:
    from ssacl.training.released import import_checkpoint

    summary = import_checkpoint(options.path, options.tokenizer, options.out, options.language_model, options.config)
    imported = summary.imported
    print(f"{summary.num_tensors} tensors read, {len(imported.extras)} kept beside the model, {len(imported.dropped)} dropped")
    for name, reason in imported.dropped.items():
        print(f"dropped {name}: {reason}")
    print(f"{len(imported.fresh)} tensors of ours are new; train the stage `findings` before asking for reports")
    if not summary.has_language:
        print("no language model tokenizer: text generation is off (give --language-model)")
    print(f"model {summary.model_version} in {options.out}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from ssacl.training.released import export_checkpoint

    summary = export_checkpoint(options.checkpoint, options.out)
    print(f"{summary.num_tensors} tensors in {options.out}; {len(summary.left_out)} of ours have no place there")
    return 0


def _show(options: argparse.Namespace) -> int:
    import json

    from ssacl.training.checkpoint import open_model

    print(json.dumps(open_model(options.checkpoint).manifest, indent=2))
    return 0
