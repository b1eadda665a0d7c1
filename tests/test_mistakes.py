"""What a draft says wrong beside its findings: sides, earlier films, texts cut short; and METEOR where there is Java."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ssacl.data.labeler import label_report
from ssacl.errors import DataError
from ssacl.evaluation.meteor import meteor_score
from ssacl.evaluation.mistakes import is_truncated, side_errors, sides, speaks_of_a_prior
from ssacl.evaluation.pairs import ReportPair
from ssacl.evaluation.pairs_evaluation import evaluate_pairs


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Right pleural effusion.", "Left pleural effusion.", (1, 1)),
        ("Right pleural effusion.", "Right pleural effusion.", (1, 0)),
        ("Right pleural effusion.", "Bilateral pleural effusions.", (0, 0)),
        ("Pleural effusion.", "Left pleural effusion.", (0, 0)),
        ("Right pleural effusion.", "No left pleural effusion.", (0, 0)),
        ("Right pleural effusion.", "Left pneumothorax.", (0, 0)),
        ("Right effusion. Left apical pneumothorax.", "Left effusion. Left apical pneumothorax.", (2, 1)),
        ("Consolidation in the RLL.", "Left lower lobe consolidation.", (1, 1)),
        ("Cardiomegaly.", "Cardiomegaly.", (0, 0)),
    ],
)
def test_sides(prediction: str, reference: str, expected: tuple[int, int]) -> None:
    assert side_errors(label_report(prediction).mentions, label_report(reference).mentions) == expected


def test_the_right_atrium_is_no_side() -> None:
    assert "Cardiomegaly" not in sides(label_report("The heart is enlarged.").mentions)


@pytest.mark.parametrize(
    "text",
    [
        "Compared to the prior film, the effusion has decreased.",
        "The heart size is unchanged.",
        "Interval removal of the tube.",
        "Again seen is a nodule.",
        "In comparison with the study of yesterday.",
        "Edema has improved.",
        "No significant change.",
        "The effusion is no longer seen.",
        "Worsening consolidation.",
    ],
)
def test_words_of_an_earlier_film(text: str) -> None:
    assert speaks_of_a_prior(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sequela of prior granulomatous disease.",
        "The heart is normal in size.",
        "A new pacemaker lead is in place.",
        "Degenerative changes of the spine.",
        "Chronic interstitial changes.",
        "",
    ],
)
def test_words_of_this_film_alone(text: str) -> None:
    assert not speaks_of_a_prior(text)


def test_reports_cut_short() -> None:
    assert is_truncated("The heart is")
    assert not is_truncated("The heart is normal. ")
    assert not is_truncated('He said "normal."')
    assert not is_truncated("  ")


def test_meteor_without_java_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="needs Java"):
        evaluate_pairs(tmp_path / "pairs.jsonl", tmp_path / "out", meteor=True)


@pytest.mark.external
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="no Java")
def test_meteor_is_the_java_programs() -> None:
    # Bars would part the fields of the program's lines; the same words score 1.
    assert meteor_score([ReportPair("a", "A left effusion ||| is present.", "A left |||effusion is present.")]) == pytest.approx(
        1.0, abs=1e-6
    )
