"""Scores report pairs, from a file or from a checkpoint's drafts: cases part by part, then figures with intervals.

Memory holds the numbers of all cases and the texts of one part.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssacl.data.labeler import Uncertain
from ssacl.errors import StorageError
from ssacl.evaluation.cases import PART_SIZE, Case, EvaluationFolder
from ssacl.evaluation.figures import LEVEL, NUM_RESAMPLES, case_quality, clinical_details, intervals, point_figures, statistics
from ssacl.evaluation.pairs import PairsFile, ReportPair
from ssacl.evaluation.text import PairScorer, ReferenceFrequencies, tokenise

if TYPE_CHECKING:
    from ssacl.data.chexbert import CheXbert

RADEVAL = "radeval.json"
SHOWN_KINDS = ("best", "median", "worst")
NUM_SHOWN = 2
"""Cases shown of each: the best, the median and the worst."""
RANKED_BY = "mean of ROUGE-L and the case's own clinical F1 over 14 findings"


def score_pairs(
    pairs: PairsFile,
    folder: EvaluationFolder,
    chexbert: CheXbert | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Case]:
    """The cases of a file of pairs, in its order; parts that `folder` holds already are read, not made again.

    Raises
    ------
    DataError
        The file has changed since it was checked.
    StorageError
        The disk is full or refuses.
    """
    frequencies = ReferenceFrequencies()
    for pair in pairs.read():
        frequencies.add(tokenise(pair.reference))
    scorer, stream, cases = PairScorer(frequencies), pairs.read(), list[Case]()
    number = 0
    while part := list(islice(stream, PART_SIZE)):
        cases += folder.part(number, part, scorer, chexbert)
        number += 1
        if progress is not None:
            progress(len(part))
    return cases


def report_figures(cases: Sequence[Case], uncertain: Uncertain, seed: int) -> dict[str, Any]:
    """What a score card says of pairs: `metrics`, `intervals`, and how they were made.

    Raises
    ------
    DataError
        There is no case.
    """
    found = statistics(cases, uncertain)
    counts = Counter(case.text for case in cases)
    return {
        "references_sha256": references_sha256(cases),
        "metrics": point_figures(found)
        | {"distinct_share": len(counts) / len(cases), "most_common_share": max(counts.values()) / len(cases)},
        "intervals": intervals(found, seed),
        "bootstrap": {"level": LEVEL, "resamples": NUM_RESAMPLES, "unit": "case", "seed": seed},
        "clinical": {labeler: scores.to_json() for labeler, scores in clinical_details(cases, uncertain).items()},
        "shown": {"ranked_by": RANKED_BY} | {kind: [cases[row].id for row in rows] for kind, rows in shown_cases(cases, uncertain).items()},
    }


def references_sha256(cases: Sequence[Case]) -> str:
    """Hash of ids and references, whatever their order: two systems were given the same cases when it is the same."""
    return hashlib.sha256("".join(sorted(f"{case.id}\t{case.reference}\n" for case in cases)).encode()).hexdigest()


def shown_cases(cases: Sequence[Case], uncertain: Uncertain) -> dict[str, list[int]]:
    """Rows of the best, the median and the worst cases by `RANKED_BY`; no case is in two of them."""
    order = np.argsort(-case_quality(cases, uncertain), kind="stable").tolist()
    count = min(NUM_SHOWN, max(1, len(order) // 3))
    middle = (len(order) - count) // 2
    rows = {"best": order[:count], "median": order[middle : middle + count], "worst": order[-count:]}
    taken: set[int] = set()
    return {kind: [row for row in each if not (row in taken or taken.add(row))] for kind, each in rows.items()}  # type: ignore[func-returns-value]


def shown_pairs(pairs: PairsFile, shown: dict[str, Any]) -> dict[str, ReportPair]:
    """Texts of the cases that `report_figures` shows, by id."""
    wanted = {identifier for kind in SHOWN_KINDS for identifier in shown[kind]}
    return {pair.id: pair for pair in pairs.read() if pair.id in wanted}


def write_radeval(pairs: PairsFile, folder: str | Path) -> Path:
    """Write `folder/radeval.json`, whole or not at all: RadEval's JSON layout, one list of references and one of hypotheses.

    Raises
    ------
    StorageError
        The disk is full or refuses.
    """
    path = Path(folder) / RADEVAL
    partial = path.with_suffix(".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for opening, name in (('{"references": [', "reference"), ('], "hypotheses": [', "prediction")):
                file.write(opening)
                for number, pair in enumerate(pairs.read()):
                    # RadEval's own readers take a report for a line.
                    file.write((",\n" if number else "\n") + json.dumps(" ".join(getattr(pair, name).split())))
            file.write("]}\n")
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror}. Free space or choose another folder with --out.") from error
    finally:
        partial.unlink(missing_ok=True)
    return path
