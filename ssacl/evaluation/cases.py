"""What each case of a report evaluation adds to its figures, and the folder in which that is kept, part by part.

    DIR/run.json              what is evaluated; another evaluation never goes into the same folder
    DIR/cases/00000.jsonl     500 cases each, ids and numbers, no text

A part is written whole or not at all: the same command again makes the parts that are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ssacl
from ssacl.anatomy import FINDINGS
from ssacl.data.labeler import label_report
from ssacl.errors import DataError, StorageError
from ssacl.evaluation.mistakes import is_truncated, side_errors, speaks_of_a_prior
from ssacl.evaluation.pairs import ReportPair
from ssacl.evaluation.text import PairScorer, tokenise
from ssacl.inference.files import write_whole

if TYPE_CHECKING:
    from ssacl.data.chexbert import CheXbert

logger = logging.getLogger(__name__)

PART_SIZE = 500
"""Cases in a part: what an interruption costs."""
_DIGEST_LETTERS = 16


@dataclass(frozen=True)
class Case:
    """One pair in numbers. Lists hold one `FindingStatus` per finding."""

    id: str
    text: str
    """Hash of the prediction, spacing aside."""
    reference: str
    """Hash of the reference, spacing aside."""
    bleu: tuple[int, ...]
    rouge_l: float
    cider_d: float
    stated: tuple[int, ...]
    """What the prediction says, read by our labeler."""
    real: tuple[int, ...]
    chexbert: str
    """Name of the CheXbert that read them too; empty without one, as are the next two."""
    chexbert_stated: tuple[int, ...]
    chexbert_real: tuple[int, ...]
    sides_compared: int
    sides_wrong: int
    prior: bool
    """The prediction speaks of an earlier film."""
    reference_prior: bool
    empty: bool
    truncated: bool


def score_cases(pairs: Sequence[ReportPair], scorer: PairScorer, chexbert: CheXbert | None = None) -> list[Case]:
    """The cases of a few pairs, in their order."""
    read: list[tuple[Sequence[int], Sequence[int]]] = [((), ())] * len(pairs)
    if chexbert is not None:
        texts = [pair.prediction for pair in pairs], [pair.reference for pair in pairs]
        read = list(zip(*(chexbert.status(each).tolist() for each in texts), strict=True))
    cases = []
    for pair, (chexbert_stated, chexbert_real) in zip(pairs, read, strict=True):
        tokens = tokenise(pair.prediction)
        count = scorer.score(tokens, tokenise(pair.reference))
        stated, real = label_report(pair.prediction), label_report(pair.reference)
        compared, wrong = side_errors(stated.mentions, real.mentions)
        cases.append(
            Case(
                *_identity(pair),
                bleu=count.bleu,
                rouge_l=count.rouge_l,
                cider_d=count.cider_d,
                stated=tuple(int(status) for status in stated.labels),
                real=tuple(int(status) for status in real.labels),
                chexbert=_name(chexbert),
                chexbert_stated=tuple(chexbert_stated),
                chexbert_real=tuple(chexbert_real),
                sides_compared=compared,
                sides_wrong=wrong,
                prior=speaks_of_a_prior(pair.prediction),
                reference_prior=speaks_of_a_prior(pair.reference),
                empty=not tokens,
                truncated=is_truncated(pair.prediction),
            )
        )
    return cases


def text_digest(text: str) -> str:
    """A short hash of a text, spacing aside."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:_DIGEST_LETTERS]


def claim_folder(folder: str | Path, parts: str, identity: dict[str, Any]) -> Path:
    """Make an output folder with a folder `parts` for one evaluation, or check that it belongs to the same one (`run.json`).

    Raises
    ------
    DataError
        The folder holds another evaluation.
    StorageError
        It cannot be used.
    """
    path = Path(folder)
    # As it comes back from JSON. Another release may read reports in another way.
    identity = json.loads(json.dumps(identity | {"ssacl": ssacl.__version__}))
    record = path / "run.json"
    try:
        (path / parts).mkdir(parents=True, exist_ok=True)
        known = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    except (OSError, ValueError) as error:
        raise StorageError(f"The output folder {path} cannot be used: {error}. Give another --out.") from error
    if known is None:
        write_whole(record, json.dumps(identity, indent=1).encode())
    elif known != identity:
        differ = sorted(key for key in {*known, *identity} if not isinstance(known, dict) or known.get(key) != identity.get(key))
        raise DataError(f"{path} holds another evaluation ({', '.join(differ)} differ). Give an empty folder with --out.")
    return path


class EvaluationFolder:
    """The output folder of one evaluation.

    Parameters
    ----------
    folder
        Made if absent.
    identity
        What is evaluated, as plain JSON: what the cases depend on.

    Raises
    ------
    DataError
        The folder holds another evaluation.
    StorageError
        It cannot be used.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.path = claim_folder(folder, "cases", identity)

    def part(self, number: int, pairs: Sequence[ReportPair], scorer: PairScorer, chexbert: CheXbert | None) -> list[Case]:
        """The cases of a part: read where those of `pairs`, read by the same labelers, are there already, else made and written."""
        path = self.path / "cases" / f"{number:05d}.jsonl"
        if path.is_file():
            try:
                known = list(_read_part(path))
            except DataError:
                logger.warning("%s is damaged and is made again", path.name)
            else:
                wanted = [(*_identity(pair), _name(chexbert)) for pair in pairs]
                if [(case.id, case.text, case.reference, case.chexbert) for case in known] == wanted:
                    return known
        cases = score_cases(pairs, scorer, chexbert)
        write_whole(path, "".join(f"{json.dumps(dataclasses.asdict(case))}\n" for case in cases).encode())
        return cases


def read_cases(folder: str | Path) -> list[Case]:
    """All cases of a finished evaluation.

    Raises
    ------
    DataError
        There are none, or they are damaged.
    """
    parts = sorted((Path(folder) / "cases").glob("*.jsonl"))
    if not parts:
        raise DataError(f"{folder} holds no cases of a report evaluation; make them with `ssacl evaluate reports --out {folder}`.")
    return [case for part in parts for case in _read_part(part)]


def _read_part(path: Path) -> Iterator[Case]:
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            tree: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(line).items()}
            case = Case(**tree)
            if not len(case.stated) == len(case.real) == len(FINDINGS):
                raise ValueError("statuses are missing")
            yield case
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged. Delete it and run the evaluation again.") from error


def _identity(pair: ReportPair) -> tuple[str, str, str]:
    return pair.id, text_digest(pair.prediction), text_digest(pair.reference)


def _name(chexbert: CheXbert | None) -> str:
    return "" if chexbert is None else chexbert.name
