"""What of the working tree a job takes to the cluster: the code and the configurations, no data, nothing that git ignores."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

import ssacl
from ssacl.errors import ClusterError

TREE = Path(ssacl.__file__).parents[1]
PARTS = ("ssacl", "ray_jobs", "serve", "configs", "pyproject.toml")
MAX_BYTES = 20 << 20
"""The code is a tenth of it; what is larger has data among it."""
_BROUGHT = "submitted"


def stage(folder: Path, config: Path | None = None, tree: Path = TREE) -> str:
    """Copy what a job needs from `tree` to the new `folder`.

    Returns
    -------
    config
        Where `config` lies, relative to `folder`; a file from outside the tree goes to `submitted/`, and with a sweep the training
        configuration that it names. "" without one.

    Raises
    ------
    ClusterError
        Together the files are larger than `MAX_BYTES`.
    """
    total = 0
    for path in _files(tree):
        total += path.stat().st_size
        if total > MAX_BYTES:
            raise ClusterError(
                f"What would be sent to the cluster is larger than {MAX_BYTES >> 20} MiB, at {path.relative_to(tree)}. Only code and "
                f"configurations travel: keep data out of {', '.join(PARTS[:-1])}, or have git ignore it; data sets belong in storage."
            )
        target = folder / path.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if config is None:
        return ""
    place = _bring(config, folder, _BROUGHT, tree)
    if place.is_relative_to(folder / _BROUGHT):
        _bring_base(config, place, folder, tree)
    return place.relative_to(folder).as_posix()


def _bring(config: Path, folder: Path, outside: str, tree: Path) -> Path:
    """Where a configuration lies below `folder`: with the tree, or, as no part of it, copied to `outside`."""
    if config.resolve().is_relative_to(tree) and (inside := folder / config.resolve().relative_to(tree)).is_file():
        return inside
    place = folder / outside / config.name
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, place)
    return place


def _bring_base(sweep: Path, place: Path, folder: Path, tree: Path) -> None:
    """Bring the training configuration that a sweep names, relative to its own file, and name it in the copy at `place`.

    What is wrong in the file is told by the job; a training configuration names none.
    """
    try:
        content = yaml.safe_load(sweep.read_text(encoding="utf-8"))
        name = content["base"]["config"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return
    if isinstance(name, str) and name:
        base = _bring(sweep.parent / name, folder, f"{_BROUGHT}/base", tree)
        content["base"]["config"] = os.path.relpath(base, place.parent)
        place.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _files(tree: Path) -> Iterator[Path]:
    """Files below `PARTS`: known to git or new, not ignored; all of them where the tree is no checkout."""
    command = ["git", "-C", str(tree), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PARTS]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode().split("\0")  # noqa: S603
        found = [tree / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        found = [path for part in PARTS for path in ((tree / part).rglob("*") if (tree / part).is_dir() else [tree / part])]
    return (path for path in sorted(set(found)) if path.is_file() and "__pycache__" not in path.parts)
