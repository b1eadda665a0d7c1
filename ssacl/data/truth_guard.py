"""Keeps data in, training and its tools away from the phantom's measuring truth (`NAME_truth`): only `ssacl.evaluation` opens it."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from ssacl.errors import SplitError

TRUTH_SUFFIX = "_truth"
"""A phantom data folder's name + this is its truth's."""
TRUTH_MANIFEST = "phantom.json"
"""What every truth folder holds."""


def refuse_truth(place: str | Path) -> None:
    """Pass unless `place` (a path or URL, there or not) is a folder named `..._truth`, or lies in a phantom's truth.

    A folder above that merely ends in `_truth` (somebody's `ground_truth/films`) is no phantom's truth and passes.

    Raises
    ------
    SplitError
        It is one, under its own name or behind a link.
    """
    text = str(place)
    if "://" in text:
        parts = urlsplit(text)
        text = parts.path if parts.scheme == "file" else f"{parts.netloc}/{parts.path}"
        if parts.scheme != "file":
            if text.rstrip("/").endswith(TRUTH_SUFFIX):
                raise _refusal(place)
            return
    # Both: a link called x_truth is refused by its name, a link to a truth by where it leads.
    for path in {Path(os.path.abspath(text)), Path(os.path.realpath(text))}:
        if path.name.endswith(TRUTH_SUFFIX) or any(is_truth_folder(folder) for folder in path.parents):
            raise _refusal(place)


def is_truth_folder(folder: Path) -> bool:
    """Whether a folder is a phantom's truth by its name and by what it holds."""
    return folder.name.endswith(TRUTH_SUFFIX) and (folder / TRUTH_MANIFEST).is_file()


def _refusal(place: str | Path) -> SplitError:
    return SplitError(
        f"{place} is measuring truth (its name ends in {TRUTH_SUFFIX}) and only evaluation opens it. Give the folder of the studies, "
        f"or rename yours if it holds something else."
    )
