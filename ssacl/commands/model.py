"""`ssacl model list|show|register|promote|rollback|verify|keys`: the model registry in object storage."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ssacl.commands import Commands

_EPILOG = """\
examples:
  ssacl model register s3://bucket/models s3://bucket/runs/NAME/model
  ssacl model promote s3://bucket/models 0123456789ab --channel canary
  ssacl model promote s3://bucket/models @canary --channel stable --reason "agreed on in the meeting"
  ssacl serve --checkpoint s3://bucket/models@stable
  ssacl model rollback s3://bucket/models --channel stable
"""


def add_parsers(commands: Commands) -> None:
    actions = commands.add_parser(
        "model", help="the model registry", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    ).add_subparsers(dest="action", required=True, metavar="ACTION")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=help, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("registry", metavar="REGISTRY", help="folder or s3://bucket/prefix")
        return parser

    add("list", "versions, and the channels that point to them").set_defaults(run=_list)
    show = add("show", "record, model card and signature of a version")
    show.add_argument("version", metavar="VERSION", help="or @CHANNEL")
    show.set_defaults(run=_show)
    register = add("register", "copy a model folder into the registry as a version")
    register.add_argument("checkpoint", metavar="URL", help="model folder, or s3:// prefix of one")
    register.add_argument("--card", type=Path, metavar="FILE", help="model card in Markdown (default: made from the manifest)")
    register.set_defaults(run=_register)
    promote = add("promote", "point a channel to a version, once its files were read and found whole")
    promote.add_argument("version", metavar="VERSION", help="or @CHANNEL")
    promote.set_defaults(run=_promote)
    rollback = add("rollback", "point a channel to its previous version")
    rollback.set_defaults(run=_rollback)
    for parser in (promote, rollback):
        parser.add_argument("--channel", required=True, metavar="NAME", help="stable, canary or another name")
        parser.add_argument("--reason", default="", help="kept in the channel's history")
    verify = add("verify", "read every file of a version and compare hashes and signature")
    verify.add_argument("version", metavar="VERSION", help="or @CHANNEL")
    verify.set_defaults(run=_verify)
    keys = actions.add_parser("keys", help="make a pair of keys to sign versions with")
    keys.add_argument("private", type=Path, metavar="PRIVATE.pem", help="SSACL_MODEL_SIGNING_KEY names it where models are registered")
    keys.add_argument("public", type=Path, metavar="PUBLIC.pem", help="SSACL_MODEL_PUBLIC_KEY names it where models are served")
    keys.set_defaults(run=_keys)


def _list(options: argparse.Namespace) -> int:
    from ssacl.data.storage import open_storage
    from ssacl.registry.channels import channel_names, read_channel
    from ssacl.registry.versions import open_version, version_names

    storage = open_storage(options.registry)
    pointing: dict[str, list[str]] = {}
    for name in channel_names(storage):
        pointing.setdefault(read_channel(storage, name).version, []).append(f"@{name}")
    names = version_names(storage)
    if not names:
        print(f"{options.registry} holds no version. Make one: ssacl model register {options.registry} MODEL", file=sys.stderr)
    for name in names:
        version = open_version(storage, name)
        print(f"{name}  {version.record['registered_at']}  {version.signature}  {' '.join(pointing.get(name, []))}".rstrip())
    return 0


def _show(options: argparse.Namespace) -> int:
    from ssacl.registry.addresses import find_version

    version = find_version(options.registry, options.version)
    print(f"{json.dumps(version.record, indent=2)}\n{version.signature}\n\n{version.card()}", end="")
    return 0


def _register(options: argparse.Namespace) -> int:
    from ssacl.data.storage import open_storage
    from ssacl.errors import RegistryError
    from ssacl.registry.versions import register
    from ssacl.training.checkpoint import local_folder

    try:
        card = options.card.read_text(encoding="utf-8") if options.card else None
    except UnicodeDecodeError as error:
        raise RegistryError(f"{options.card} is no text in UTF-8; give the model card as Markdown.") from error
    with local_folder(options.checkpoint) as folder:
        version = register(open_storage(options.registry), open_storage(options.checkpoint), folder, card)
    print(f"version: {version.version} ({version.signature})")
    return 0


def _promote(options: argparse.Namespace) -> int:
    from ssacl.data.storage import open_storage
    from ssacl.registry.addresses import find_version
    from ssacl.registry.channels import promote

    version = find_version(options.registry, options.version).version
    print(f"{options.channel}: {promote(open_storage(options.registry), version, options.channel, options.reason).version}")
    return 0


def _rollback(options: argparse.Namespace) -> int:
    from ssacl.data.storage import open_storage
    from ssacl.registry.channels import rollback

    print(f"{options.channel}: {rollback(open_storage(options.registry), options.channel, options.reason).version}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from ssacl.registry.addresses import find_version

    version = find_version(options.registry, options.version)
    print(f"{version.version}: {version.check_files()} files are whole, {version.signature}")
    return 0


def _keys(options: argparse.Namespace) -> int:
    from ssacl.registry.signing import new_keys

    new_keys(options.private, options.public)
    print(f"private, for SSACL_MODEL_SIGNING_KEY: {options.private}\npublic, for SSACL_MODEL_PUBLIC_KEY: {options.public}")
    return 0
