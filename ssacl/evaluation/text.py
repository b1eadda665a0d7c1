"""Report text against reference text: BLEU, ROUGE-L and CIDEr-D by the reference scorers, without Java, and how varied the reports are.

References are scored whole: nothing is truncated.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ssacl.errors import DataError

TOKENISATION = "lower case, full stops set apart, split at white space, punctuation kept"
SCORER = "pycocoevalcap"
MAX_BLEU_ORDER = 4
# A stop between two digits is a decimal point ("3.5 cm"), not the end of a sentence.
_FULL_STOP = re.compile(r"\.(?!(?<=\d\.)\d)")


def tokenise(text: str) -> list[str]:
    """Tokens as `TOKENISATION` says."""
    return _FULL_STOP.sub(" . ", text.lower()).split()


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus scores `bleu_1` to `bleu_4`, `rouge_l`, `cider_d`.

    BLEU and ROUGE-L lie in 0..1; CIDEr-D in 0..10, with document frequencies of these references, so that it is 0 for a single pair. An
    empty prediction counts as a report without a token.

    Parameters
    ----------
    predictions
        One report per case.
    references
        The radiologist's report of each case, whole.

    Raises
    ------
    DataError
        The lengths differ, there is no pair, or references are empty.
    """
    hypotheses, truths = _checked(predictions, references)
    return {**_bleu(hypotheses, truths), "rouge_l": _rouge_l(hypotheses, truths), "cider_d": _cider_d(hypotheses, truths)}


def diversity(predictions: Sequence[str]) -> dict[str, Any]:
    """How varied reports are: distinct share, share of the most common one, share of empty ones, mean length in tokens.

    Raises
    ------
    DataError
        There is no report.
    """
    if not predictions:
        raise DataError("There is no report to score; check the split and the limit.")
    texts = [" ".join(text.split()) for text in predictions]
    counts = Counter(texts)
    return {
        "num_reports": len(texts),
        "distinct_share": len(counts) / len(texts),
        "most_common_share": max(counts.values()) / len(texts),
        "empty_share": counts[""] / len(texts),
        "mean_tokens": sum(len(tokenise(text)) for text in texts) / len(texts),
    }


def _checked(predictions: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions and {len(references)} references; each prediction needs its own reference.")
    if not predictions:
        raise DataError("There is no report pair to score; check the split and the limit.")
    # The scorers split at white space themselves.
    hypotheses, truths = ([" ".join(tokenise(text)) for text in texts] for texts in (predictions, references))
    num_empty = sum(not text for text in truths)
    if num_empty:
        raise DataError(f"{num_empty} of {len(truths)} references are empty; leave studies without a report out.")
    return hypotheses, truths


def _bleu(hypotheses: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=MAX_BLEU_ORDER)
    for hypothesis, truth in zip(hypotheses, truths, strict=True):
        scorer += (hypothesis, [truth])
    corpus, _ = scorer.compute_score(option="closest")
    return {f"bleu_{order}": float(score) for order, score in enumerate(corpus, start=1)}


def _rouge_l(hypotheses: Sequence[str], truths: Sequence[str]) -> float:
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = Rouge()
    return sum(float(scorer.calc_score([hypothesis], [truth])) for hypothesis, truth in zip(hypotheses, truths, strict=True)) / len(truths)


def _cider_d(hypotheses: Sequence[str], truths: Sequence[str]) -> float:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for hypothesis, truth in zip(hypotheses, truths, strict=True):
        scorer += (hypothesis, [truth])
    corpus, _ = scorer.compute_score()
    return float(corpus)
