"""The labeler's benchmark: its figures on a case worked out by hand, and what it says to files that do not fit."""

import argparse
import csv
import hashlib
from pathlib import Path

import pytest

from benchmarks.labeler import NAMES, measure, real_figures, real_reports
from ssacl.errors import DataError

FINDINGS_TEXT = "Small left effusion. No pneumothorax. Possible pneumonia. Views of the chest."


def write(folder: Path, labels: list[dict[str, str]], text: str = FINDINGS_TEXT) -> Path:
    with (folder / "reports.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["uid", "findings", "impression"])
        writer.writeheader()
        writer.writerow({"uid": "A1", "findings": text, "impression": "Cardiomegaly."})
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sentence", "sha256", "drawn", *NAMES], restval="")
        writer.writeheader()
        writer.writerows(labels)
    return folder / "labels.csv"


def row(sentence: str, text: str, drawn: str = "random", **labels: str) -> dict[str, str]:
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"sentence": sentence, "sha256": digest, "drawn": drawn} | {name.replace("_", " "): value for name, value in labels.items()}


ROWS = [
    row("A1/findings/0", "Small left effusion.", Pleural_Effusion="1"),
    row("A1/findings/1", "No pneumothorax.", "word", Pneumothorax="0", Pleural_Effusion="0"),
    row("A1/findings/2", "Possible pneumonia.", "word", Pneumonia="1"),
    row("A1/impression/0", "Cardiomegaly.", Cardiomegaly="1"),
]


def test_figures_of_a_case_by_hand(tmp_path: Path) -> None:
    labels = write(tmp_path, ROWS)
    figures = real_figures(real_reports(tmp_path), labels)
    present, absent, uncertain = (figures["micro"][name] for name in ("present", "absent", "uncertain"))
    # Pneumonia is read as uncertain where the hand says present; one of two denials is missed.
    assert (present["precision"], present["recall"], present["f1"]) == (1.0, 0.6667, 0.8)
    assert (absent["precision"], absent["recall"]) == (1.0, 0.5)
    assert (uncertain["precision"], uncertain["recall"], uncertain["num_predicted"]) == (0.0, None, 1)
    assert 0 <= present["f1_95"][0] < 0.8 < present["f1_95"][1] <= 1
    assert figures["findings"]["Pleural Effusion"]["present"]["num_right"] == 1
    assert "Fracture" not in figures["findings"]
    assert figures["micro_by_draw"]["random"]["present"]["recall"] == 1.0
    assert figures["micro_by_draw"]["word"]["num_sentences"] == 2
    assert figures["sentences_with_every_status_right"] == 0.5


def test_the_whole_with_phantoms(tmp_path: Path) -> None:
    labels = write(tmp_path, ROWS)
    measured = measure(argparse.Namespace(real=tmp_path, labels=labels, num_phantoms=40, quick=False))
    phantom = measured.figures["phantom"]
    assert phantom["num_reports"] == 40
    assert phantom["micro"]["present"]["num_true"] > 20
    assert phantom["micro"]["present"]["f1"] >= 0.99
    assert phantom["absent_precision"] == 1.0
    # No word of a report in the record.
    assert "effusion." not in str(measured.figures)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([row("A1/findings/0", "Another text.")], "is not the one that was labelled"),
        ([row("B1/findings/0", "Small left effusion.")], "is not the one that was labelled"),
        ([row("A1/findings/99", "Small left effusion.")], "is not the one that was labelled"),
        ([row("A1/uid/0", "A1")], "is not the one that was labelled"),
        ([row("A1/findings/0", "Small left effusion.", Edema="yes")], "expected 1, 0, -1 or nothing"),
        ([ROWS[0], ROWS[0]], "names a sentence twice"),
        ([], "is empty"),
    ],
)
def test_labels_that_do_not_fit_are_named(labels: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    path = write(tmp_path, labels)
    with pytest.raises(DataError, match=message):
        real_figures(real_reports(tmp_path), path)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        real_reports(tmp_path)
    (tmp_path / "reports.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column uid, findings, impression"):
        real_reports(tmp_path)
    with pytest.raises(DataError, match="give both"):
        measure(argparse.Namespace(real=tmp_path, labels=None, num_phantoms=1, quick=False))
