"""Report text against reference text: BLEU, ROUGE-L and CIDEr-D as pycocoevalcap defines them, without Java, and how varied reports are.

References are scored whole: nothing is truncated. A corpus score is made of what `PairScorer` counts case by case, so that many pairs need
little memory and intervals no second pass. The reference scorers hold every n-gram of a corpus and take five times as long; tests
hold ours to theirs.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ssacl.errors import DataError

TOKENISATION = "lower case, full stops set apart, split at white space, punctuation kept"
SCORER = "as pycocoevalcap 1.2: BLEU with the closest length, ROUGE-L with beta 1.2, CIDEr-D with sigma 6"
MAX_ORDER = 4
CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2
_BUFFERED_NGRAMS = 1 << 20
# pycocoevalcap's guards against a division by zero.
_SMALL, _TINY = 1e-9, 1e-15
# A stop between two digits is a decimal point ("3.5 cm"), not the end of a sentence.
_FULL_STOP = re.compile(r"\.(?!(?<=\d\.)\d)")


def tokenise(text: str) -> list[str]:
    """Tokens as `TOKENISATION` says."""
    return _FULL_STOP.sub(" . ", text.lower()).split()


@dataclass(frozen=True)
class TextCounts:
    """What one pair adds to the corpus scores."""

    bleu: tuple[int, ...]
    """Tokens of the prediction and of the reference, then n-grams of the prediction by order, then those that the reference has too."""
    rouge_l: float
    cider_d: float


class ReferenceFrequencies:
    """In how many references an n-gram stands: CIDEr's document frequencies, held as hashes.

    An n-gram of one reference weighs as much as one of none, so that only those of two and more are kept in the end.
    """

    def __init__(self) -> None:
        self._num_references = 0
        self._new = array("q")
        self._keys, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)

    def add(self, reference: Sequence[str]) -> None:
        """Count the tokens of a reference."""
        self._num_references += 1
        self._new.extend(hash(ngram) for counts in _ngrams(reference) for ngram in counts)
        if len(self._new) >= _BUFFERED_NGRAMS:
            self._merge()

    def weights(self) -> tuple[dict[int, float], float]:
        """Inverse frequencies (their logarithm) by the hash of the n-gram, and that of all the others."""
        self._merge()
        often = self._counts > 1
        highest = math.log(max(self._num_references, 1))
        logs = highest - np.log(self._counts[often])
        return dict(zip(self._keys[often].tolist(), logs.tolist(), strict=True)), highest

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, np.frombuffer(self._new, np.int64)])
        times = np.concatenate([self._counts, np.ones(len(self._new), np.int64)])
        self._keys, places = np.unique(keys, return_inverse=True)
        self._counts = np.bincount(places, times, minlength=len(self._keys)).astype(np.int64)
        self._new = array("q")


class PairScorer:
    """Scores pairs of a corpus, all of whose references `frequencies` has counted before."""

    def __init__(self, frequencies: ReferenceFrequencies) -> None:
        self._weights, self._highest = frequencies.weights()

    def score(self, prediction: Sequence[str], reference: Sequence[str]) -> TextCounts:
        """Counts of a pair of token lists; the reference is not empty."""
        stated, real = _ngrams(prediction), _ngrams(reference)
        guessed = tuple(max(0, len(prediction) - order) for order in range(MAX_ORDER))
        correct = tuple(sum((ours & theirs).values()) for ours, theirs in zip(stated, real, strict=True))
        bleu = (len(prediction), len(reference), *guessed, *correct)
        return TextCounts(bleu, rouge_l(prediction, reference), self._cider_d(stated, real))

    def _cider_d(self, stated: Sequence[Counter[tuple[str, ...]]], real: Sequence[Counter[tuple[str, ...]]]) -> float:
        total = 0.0
        for ours, theirs in zip(stated, real, strict=True):
            first, second = self._weighed(ours), self._weighed(theirs)
            overlap = sum(min(weight, second[ngram]) * second[ngram] for ngram, weight in first.items() if ngram in second)
            norms = math.sqrt(sum(each * each for each in first.values()) * sum(each * each for each in second.values()))
            total += overlap / norms if norms else 0.0
        # The reference takes the number of word pairs for the length of a text.
        longer = stated[1].total() - real[1].total()
        return 10 * total / MAX_ORDER * math.exp(-(longer**2) / (2 * CIDER_SIGMA**2))

    def _weighed(self, counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        weights, highest = self._weights, self._highest
        return {ngram: count * weights.get(hash(ngram), highest) for ngram, count in counts.items()}


def _ngrams(tokens: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram stands in a text, by order."""
    return [Counter(zip(*(tokens[start:] for start in range(order)), strict=False)) for order in range(1, MAX_ORDER + 1)]


def bleu_of(counts: ArrayLike) -> NDArray[np.float64]:
    """BLEU-1 to BLEU-4 [..., 4] of summed `TextCounts.bleu` [..., 10], with pycocoevalcap's brevity penalty."""
    summed = np.asarray(counts, dtype=np.float64)
    tokens, reference_tokens = summed[..., 0], summed[..., 1]
    guessed, correct = summed[..., 2 : 2 + MAX_ORDER], summed[..., 2 + MAX_ORDER :]
    precision = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (tokens + _TINY) / (reference_tokens + _SMALL)
    penalty: NDArray[np.float64] = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return precision * penalty[..., None]


def rouge_l(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """ROUGE-L of two lists of tokens, as pycocoevalcap weighs it."""
    common = _longest_common_subsequence(prediction, reference)
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length, by the bit-parallel recurrence of Hyyro (2004): one integer holds a row of the table."""
    places: dict[str, int] = {}
    for index, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << index
    everything = row = (1 << len(first)) - 1
    for token in second:
        matched = row & places.get(token, 0)
        row = (row + matched | row - matched) & everything
    return len(first) - row.bit_count()


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
    frequencies = ReferenceFrequencies()
    for truth in truths:
        frequencies.add(truth)
    scorer = PairScorer(frequencies)
    counts = [scorer.score(hypothesis, truth) for hypothesis, truth in zip(hypotheses, truths, strict=True)]
    bleu = bleu_of(np.sum([each.bleu for each in counts], axis=0))
    return {
        **{f"bleu_{order}": float(score) for order, score in enumerate(bleu, start=1)},
        "rouge_l": float(np.mean([each.rouge_l for each in counts])),
        "cider_d": float(np.mean([each.cider_d for each in counts])),
    }


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


def _checked(predictions: Sequence[str], references: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions and {len(references)} references; each prediction needs its own reference.")
    if not predictions:
        raise DataError("There is no report pair to score; check the split and the limit.")
    hypotheses, truths = ([tokenise(text) for text in texts] for texts in (predictions, references))
    num_empty = sum(not tokens for tokens in truths)
    if num_empty:
        raise DataError(f"{num_empty} of {len(truths)} references are empty; leave studies without a report out.")
    return hypotheses, truths
