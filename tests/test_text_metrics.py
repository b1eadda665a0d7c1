"""Text scores: equal to the reference scorers and to numbers worked out by hand; whole references; named errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from ssacl.errors import DataError
from ssacl.evaluation.text import diversity, text_scores, tokenise

WORDS = ["the", "heart", "is", "enlarged", ".", "no", "effusion", "left", "right", "lung", "clear", ","]
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)


def test_tokens_are_as_the_card_says() -> None:
    assert tokenise("The Heart is normal.No effusion, no 3.5 cm mass.") == [
        *("the", "heart", "is", "normal", ".", "no", "effusion,", "no", "3.5", "cm", "mass", ".")
    ]
    assert tokenise("Level 2. 3 nodules.") == ["level", "2", ".", "3", "nodules", "."]
    assert tokenise("  \n ") == []


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(sentences, sentences), min_size=2, max_size=6))
def test_equal_to_the_reference_scorers(pairs: list[tuple[str, str]]) -> None:
    predictions, references = zip(*pairs, strict=True)
    scores = text_scores(predictions, references)
    gts = {index: [" ".join(tokenise(text))] for index, text in enumerate(references)}
    res = {index: [" ".join(tokenise(text))] for index, text in enumerate(predictions)}
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    for order in range(4):
        assert scores[f"bleu_{order + 1}"] == pytest.approx(bleu[order], abs=1e-9)
    assert scores["rouge_l"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-9)
    assert scores["cider_d"] == pytest.approx(Cider().compute_score(gts, res)[0], abs=1e-9)


def test_bleu_and_rouge_by_hand() -> None:
    # 5 of 5 words are in the reference of 6, 4 of 4 pairs: brevity penalty e^(1 - 6/5).
    scores = text_scores(["the heart is enlarged ."], ["the heart is enlarged . today"])
    assert scores["bleu_1"] == pytest.approx(math.exp(1 - 6 / 5), abs=1e-6)
    assert scores["bleu_4"] == pytest.approx(math.exp(1 - 6 / 5), abs=1e-6)
    precision, recall, beta = 1.0, 5 / 6, 1.2
    assert scores["rouge_l"] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))
    # Corpus, not the mean of sentences: 3 of 4 words over both pairs.
    assert text_scores(["a b", "c d"], ["a b", "c e"])["bleu_1"] == pytest.approx(0.75, abs=1e-6)


def test_a_perfect_corpus_scores_full_marks_and_a_foreign_one_none() -> None:
    references = [
        "The heart is enlarged. No effusion.",
        "Clear lungs. No pneumothorax is seen today.",
        "A left rib is broken, with a hematoma.",
    ]
    perfect = text_scores(references, references)
    assert perfect["bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert perfect["rouge_l"] == pytest.approx(1.0)
    assert perfect["cider_d"] == pytest.approx(10.0)
    foreign = text_scores(["xx yy zz ww"] * 3, references)
    assert max(foreign.values()) < 1e-3


def test_references_are_never_truncated() -> None:
    body = " ".join(f"word{number}" for number in range(150))
    tail = body.replace("word149", "other")
    assert text_scores([body], [body])["bleu_1"] == pytest.approx(1.0, abs=1e-6)
    assert text_scores([body], [tail])["bleu_1"] == pytest.approx(149 / 150, abs=1e-6)


def test_an_empty_prediction_counts_as_nothing_and_is_not_dropped() -> None:
    scores = text_scores(["", "a b c d"], ["a b c d", "a b c d"])
    assert scores["rouge_l"] == pytest.approx(0.5)
    assert scores["bleu_1"] == pytest.approx(math.exp(1 - 2), abs=1e-6)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "no report pair"),
        (["a"], ["a", "b"], "1 predictions and 2 references"),
        (["a", "b", "c"], ["a", " ", ""], "2 of 3 references"),
    ],
)
def test_bad_pairs_are_named(predictions: list[str], references: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        text_scores(predictions, references)


def test_diversity_counts_reports_not_their_spacing() -> None:
    assert diversity(["a b", "a  b", "c.", ""]) == {
        "num_reports": 4,
        "distinct_share": 0.75,
        "most_common_share": 0.5,
        "empty_share": 0.25,
        "mean_tokens": np.mean([2, 2, 2, 0]),
    }
    with pytest.raises(DataError, match="no report"):
        diversity([])
