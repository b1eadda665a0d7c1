"""METEOR by pycocoevalcap's wrapper of the Java program; an option, because it needs Java and two gigabytes of memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable

from ssacl.errors import DataError
from ssacl.evaluation.pairs import ReportPair
from ssacl.evaluation.text import tokenise


def need_java() -> None:
    """Refuse where METEOR cannot run.

    Raises
    ------
    DataError
        There is no Java.
    """
    if shutil.which("java") is None:
        raise DataError("METEOR needs Java, and there is no 'java' on the PATH. Install a Java runtime, or leave --meteor out.")


def meteor_score(pairs: Iterable[ReportPair]) -> float:
    """METEOR 1.5 of the whole corpus, 0..1, with the tokens of the other text scores.

    Raises
    ------
    DataError
        There is no Java, or the program fails.
    """
    need_java()
    from pycocoevalcap.meteor.meteor import Meteor

    references, predictions = {}, {}
    for number, pair in enumerate(pairs):
        # Three bars part the fields of the program's lines.
        reference, prediction = (" ".join(tokenise(text.replace("|||", " "))) for text in (pair.reference, pair.prediction))
        references[number], predictions[number] = [reference], [prediction]
    scorer = Meteor()
    try:
        score, _ = scorer.compute_score(references, predictions)
    except (OSError, ValueError) as error:
        raise DataError("METEOR's Java program failed. Run `java -version`, or leave --meteor out.") from error
    return float(score)
