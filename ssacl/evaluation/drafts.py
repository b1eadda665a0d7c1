"""A checkpoint's drafts kept on disk, so that an interrupted evaluation does not make them again.

`DIR/drafts/00000.npz` holds the answers to one piece of work, without anything that could run code when it is read.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssacl.errors import StorageError
from ssacl.evaluation.predictions import Predictions, Runner, Work
from ssacl.inference.files import write_whole

logger = logging.getLogger(__name__)

_TEXTS = ("keys", "digests", "reports", "references")
_ARRAYS = tuple(item.name for item in dataclasses.fields(Predictions) if item.name not in _TEXTS)


class DraftFolder:
    """Drafts of one evaluation, below its output folder, which belongs to that evaluation alone.

    Parameters
    ----------
    folder
        The evaluation's output folder.

    Raises
    ------
    StorageError
        It cannot be used.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / "drafts"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"The output folder {folder} cannot be used ({error.strerror}). Give another --out.") from error

    def run(self, runner: Runner, work: Sequence[Work]) -> Iterator[Predictions]:
        """Answers to all work, in any order: kept ones from disk, the others from `runner`, which are kept as they come."""
        missing = []
        numbers = {}
        for number, each in enumerate(work):
            kept = self._read(number, each)
            if kept is not None:
                yield kept
            else:
                missing.append(each)
                numbers[_keys(each)] = number
        for answer in runner.run(missing) if missing else ():
            write_whole(self._file(numbers[answer.keys]), _packed(answer))
            yield answer

    def _file(self, number: int) -> Path:
        return self._path / f"{number:05d}.npz"

    def _read(self, number: int, work: Work) -> Predictions | None:
        path = self._file(number)
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                texts = json.loads(file["texts"].tobytes())
                columns: dict[str, Any] = {name: tuple(texts[name]) for name in _TEXTS} | {name: file[name] for name in _ARRAYS}
                kept = Predictions(**columns)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            logger.warning("%s is damaged and is made again", path.name)
            return None
        return kept if kept.keys == _keys(work) else None


def _keys(work: Work) -> tuple[str, ...]:
    return tuple(entry.key for entry in work.entries)


def _packed(answer: Predictions) -> bytes:
    texts = json.dumps({name: getattr(answer, name) for name in _TEXTS}).encode()
    content = io.BytesIO()
    np.savez(content, texts=np.frombuffer(texts, np.uint8), **{name: getattr(answer, name) for name in _ARRAYS})
    return content.getvalue()
