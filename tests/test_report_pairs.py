"""Evaluation of report pairs: equal to the reference scorers, named bad input, resumable, and two systems compared."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sklearn.metrics import precision_recall_fscore_support

from ssacl.cli import main
from ssacl.data.labeler import label_report
from ssacl.errors import DataError
from ssacl.evaluation import cases as cases_module
from ssacl.evaluation import figures as figures_module
from ssacl.evaluation.cases import read_cases
from ssacl.evaluation.compare import compare, paired_figures
from ssacl.evaluation.figures import intervals, point_figures, statistics
from ssacl.evaluation.pairs import MAX_LINE_BYTES, check_pairs
from ssacl.evaluation.pairs_evaluation import evaluate_pairs
from ssacl.evaluation.scorecard import read_card
from ssacl.evaluation.text import tokenise
from ssacl.scores.clinical import GROUPS, positives

SENTENCES = [
    "There is a small left pleural effusion.",
    "There is a large right pleural effusion.",
    "The heart is enlarged.",
    "The heart is normal in size.",
    "Possible right basilar consolidation.",
    "No pneumothorax.",
    "Mild pulmonary edema, unchanged from the prior study.",
    "A left apical pneumothorax is present.",
    "The lungs are clear.",
]


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    return path


def some_pairs(count: int, seed: int, copied: float = 0.3) -> list[dict[str, Any]]:
    """References of a fixed corpus; predictions of a system that copies a share of them."""
    corpus, system = random.Random(0), random.Random(seed)
    pairs = []
    for number in range(count):
        reference = " ".join(corpus.sample(SENTENCES, 3))
        prediction = reference if system.random() < copied else " ".join(system.sample(SENTENCES, system.randint(1, 4)))
        pairs.append({"id": f"case-{number}", "prediction": prediction, "reference": reference})
    return pairs


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
    folder, pairs = tmp_path_factory.mktemp("pairs"), some_pairs(60, 1)
    pairs[3]["prediction"] = ""
    pairs[4]["prediction"] = "The heart is <b>enlarged</b> and the"
    return folder / "out", pairs, evaluate_pairs(write_pairs(folder / "pairs.jsonl", pairs), folder / "out", seed=5)


def test_metrics_equal_the_reference_scorers(evaluated: tuple[Path, list[dict[str, Any]], dict[str, Any]]) -> None:
    out, pairs, card = evaluated
    metrics = json.loads((out / "scorecard.json").read_text())["metrics"]
    assert metrics == card["metrics"]
    gts = {pair["id"]: [" ".join(tokenise(pair["reference"]))] for pair in pairs}
    res = {pair["id"]: [" ".join(tokenise(pair["prediction"]))] for pair in pairs}
    assert [metrics[f"bleu_{order}"] for order in range(1, 5)] == pytest.approx(Bleu(4).compute_score(gts, res, verbose=0)[0], abs=1e-6)
    assert metrics["rouge_l"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-6)
    assert metrics["cider_d"] == pytest.approx(Cider().compute_score(gts, res)[0], abs=1e-6)
    stated, real = (
        positives([[int(each) for each in label_report(pair[side]).labels] for pair in pairs], "present")[0]
        for side in ("prediction", "reference")
    )
    for group, names in GROUPS.items():
        columns = [list(GROUPS["14"]).index(name) for name in names]
        for average, name in (("micro", "micro"), ("macro", "macro"), ("samples", "example")):
            expected = precision_recall_fscore_support(real[:, columns], stated[:, columns], average=average, zero_division=0)
            found = [metrics[f"clinical_{kind}_{name}_{group}"] for kind in ("precision", "recall", "f1")]
            assert found == pytest.approx(expected[:3], abs=1e-6)
    per_finding = precision_recall_fscore_support(real, stated, average=None, zero_division=0)[2]
    assert metrics["clinical_f1_pleural_effusion"] == pytest.approx(per_finding[GROUPS["14"].index("Pleural Effusion")], abs=1e-6)
    assert metrics["empty_share"] == metrics["truncated_share"] == pytest.approx(1 / 60)


def test_the_card_says_what_figures_depend_on_and_the_page_needs_nothing_else(
    evaluated: tuple[Path, list[dict[str, Any]], dict[str, Any]],
) -> None:
    out, _, card = evaluated
    assert read_card(out)["labeler"] == "ssacl.data.labeler"
    assert (card["uncertain"], card["truncation"], card["checkpoint"], card["seed"]) == ("present", "none", None, 5)
    assert "full stops set apart" in card["tokenisation"]
    assert len(card["data"]["sha256"]) == 64
    for name in ("bleu_4", "rouge_l", "cider_d", "clinical_f1_micro_14"):
        low, high = card["intervals"][name]
        assert low < card["metrics"][name] < high
    page = (out / "scorecard.html").read_text()
    assert not re.search(r"<script|<link|@import|url\(|(?:src|href)=.(?!data:)", page)
    assert "<b>" not in page
    shown = card["shown"]
    assert {len(shown[kind]) for kind in ("best", "median", "worst")} == {2}
    assert "case-3" in shown["worst"], "the empty report"
    assert all(identifier in page for kind in ("best", "median", "worst") for identifier in shown[kind])
    radeval = json.loads((out / "radeval.json").read_text())
    assert list(radeval) == ["references", "hypotheses"]
    assert [len(texts) for texts in radeval.values()] == [60, 60]
    assert radeval["hypotheses"][3] == ""


def test_intervals_are_those_of_resampled_cases(evaluated: tuple[Path, list[dict[str, Any]], dict[str, Any]]) -> None:
    out, _, card = evaluated
    cases = read_cases(out)
    rng, scores = np.random.default_rng(5), []
    for _ in range(120):
        chosen = [cases[index] for index in rng.integers(len(cases), size=len(cases))]
        scores.append([point_figures(statistics(chosen, "present"))[name] for name in ("bleu_4", "clinical_f1_micro_14")])
    for column, name in enumerate(("bleu_4", "clinical_f1_micro_14")):
        assert card["intervals"][name] == pytest.approx(np.quantile([row[column] for row in scores], [0.025, 0.975]), abs=0.05)
    assert intervals(statistics(cases, "present"), 5) == card["intervals"], "the same seed, the same intervals"


BAD = {
    "no JSON": "{'id': 1}",
    "JSON that is no object": "[1]",
    "other keys": '{"id": "x", "prediction": "a", "reference": "b", "split": "val"}',
    "a missing id": '{"prediction": "a", "reference": "b"}',
    "an id that is no text": '{"id": [1], "prediction": "a", "reference": "b"}',
    "a report that is no text": '{"id": "x", "prediction": null, "reference": "b"}',
    "letters that are no Unicode": '{"id": "x", "prediction": "\\ud800", "reference": "b"}',
    "an empty reference": '{"id": "x", "prediction": "a", "reference": "  "}',
    f"more than {MAX_LINE_BYTES} bytes": json.dumps({"id": "x", "prediction": "a " * MAX_LINE_BYTES, "reference": "b"}),
    "an id that an earlier line has": '{"id": "good", "prediction": "secret", "reference": "b"}',
}


def test_every_bad_line_is_counted_by_kind_and_nothing_is_dropped(tmp_path: Path) -> None:
    good = '{"id": "good", "prediction": "", "reference": "b"}'
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join([good, *BAD.values(), BAD["no JSON"]]) + "\n")
    with pytest.raises(DataError, match=f"{len(BAD) + 1} of {len(BAD) + 2} lines") as raised:
        evaluate_pairs(path, tmp_path / "out")
    for number, kind in enumerate(BAD, start=2):
        assert f"{kind} (line {number}" in str(raised.value)
    assert "2 with no JSON (line 2, 12)" in str(raised.value)
    assert "secret" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_files_that_hold_no_pair(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no pair"):
        check_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        check_pairs(tmp_path / "none.jsonl")
    pairs = check_pairs(write_pairs(tmp_path / "pairs.jsonl", some_pairs(3, 0)))
    write_pairs(tmp_path / "pairs.jsonl", some_pairs(4, 0))
    with pytest.raises(DataError, match="changed while it was read"):
        list(pairs.read())


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssacl.evaluation.report_scores.PART_SIZE", 10)
    path = write_pairs(tmp_path / "pairs.jsonl", some_pairs(35, 1))
    whole = evaluate_pairs(path, tmp_path / "whole")
    made, score_cases = [], cases_module.score_cases

    def until_stopped(pairs: Any, *rest: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(pairs[0].id)
        return score_cases(pairs, *rest)

    monkeypatch.setattr(cases_module, "score_cases", until_stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluate_pairs(path, tmp_path / "out")
    assert not (tmp_path / "out" / "scorecard.json").exists()
    made.append("third")
    (tmp_path / "out" / "cases" / "00001.jsonl").write_text("{")
    card = evaluate_pairs(path, tmp_path / "out")
    assert made[3:] == ["case-10", "case-20", "case-30"], "the damaged part and what was missing"
    assert card == whole
    with pytest.raises(DataError, match="another evaluation"):
        evaluate_pairs(write_pairs(path, some_pairs(35, 2)), tmp_path / "out")


def test_two_systems_on_the_same_cases(tmp_path: Path) -> None:
    for name, seed, copied in (("poor", 1, 0.1), ("good", 2, 0.8), ("alike", 3, 0.1)):
        pairs = some_pairs(80, seed, copied)
        # The order of lines must not matter.
        evaluate_pairs(write_pairs(tmp_path / f"{name}.jsonl", pairs[::-1] if name == "good" else pairs), tmp_path / name)
    figures = compare(tmp_path / "poor", tmp_path / "good", tmp_path / "out")["figures"]
    for name in ("bleu_4", "cider_d", "clinical_f1_micro_14"):
        row = figures[name]
        assert row["difference"] == pytest.approx(row["b"] - row["a"])
        assert 0 < row["low"] < row["difference"] < row["high"]
        assert (row["p"] < 0.01, row["better"]) == (True, "B")
    assert compare(tmp_path / "poor", tmp_path / "alike", tmp_path / "out")["figures"]["rouge_l"]["better"] is None
    same = compare(tmp_path / "poor", tmp_path / "poor", tmp_path / "out")["figures"]
    assert {(row["difference"], row["p"]) for row in same.values() if row["difference"] is not None} == {(0.0, 1.0)}
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["num_cases"] == 80
    assert "approximate randomization" in (tmp_path / "out" / "comparison.html").read_text()


def test_p_is_that_of_all_swaps(monkeypatch: pytest.MonkeyPatch, evaluated: tuple[Path, list[dict[str, Any]], dict[str, Any]]) -> None:
    """Six cases have 64 ways to change places: the share of them with as large a difference is the exact p."""
    known = read_cases(evaluated[0])[10:16]
    a = [dataclasses.replace(case, rouge_l=value) for case, value in zip(known, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True)]
    b = [dataclasses.replace(case, rouge_l=value) for case, value in zip(known, (0.4, 0.3, 0.5, 0.8, 0.4, 0.9), strict=True)]
    gains = np.array([0.3, 0.1, 0.2, 0.4, -0.1, 0.3])
    signs = np.array(np.meshgrid(*[[1, -1]] * 6)).reshape(6, -1)
    exact = (np.abs(gains @ signs) >= gains.sum() - 1e-9).mean()
    monkeypatch.setattr("ssacl.evaluation.compare.NUM_SWAPS", 4000)
    assert paired_figures(a, b, "present", 0)["rouge_l"]["p"] == pytest.approx(exact, abs=0.015)
    assert figures_module.LEVEL == 0.95


def test_evaluations_that_cannot_be_compared(tmp_path: Path) -> None:
    pairs = some_pairs(12, 1)
    others = {
        "base": pairs,
        "fewer": pairs[:10],
        "renamed": [pair | {"id": f"x{pair['id']}"} for pair in pairs],
        "cut": [pair | {"reference": pair["reference"][:30]} if number < 4 else pair for number, pair in enumerate(pairs)],
    }
    for name, each in others.items():
        evaluate_pairs(write_pairs(tmp_path / f"{name}.jsonl", each), tmp_path / name, split="val" if name == "base" else None)
    for name, message in {
        "fewer": "2 ids are in A alone, 0 in B alone",
        "renamed": "12 ids are in A alone, 12 in B alone",
        "cut": "4 of 12 references differ",
        "nothing": "not a readable score card",
    }.items():
        with pytest.raises(DataError, match=message):
            compare(tmp_path / "base", tmp_path / name, tmp_path / "out")
    evaluate_pairs(tmp_path / "base.jsonl", tmp_path / "absent", uncertain="absent")
    with pytest.raises(DataError, match=r"other policies: uncertain \(present and absent\)"):
        compare(tmp_path / "base", tmp_path / "absent", tmp_path / "out")
    evaluate_pairs(tmp_path / "base.jsonl", tmp_path / "test", split="test")
    with pytest.raises(DataError, match="different splits: val and test"):
        compare(tmp_path / "base", tmp_path / "test", tmp_path / "out")
    card = read_card(tmp_path / "base")
    for name in ("one", "two"):
        shutil.copytree(tmp_path / "base", tmp_path / name)
        card["data"]["data_set_sha256"] = name
        (tmp_path / name / "scorecard.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match="different data sets"):
        compare(tmp_path / "one", tmp_path / "two", tmp_path / "out")
    shutil.rmtree(tmp_path / "two" / "cases")
    with pytest.raises(DataError, match="holds no cases"):
        compare(tmp_path / "one", tmp_path / "two", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Give either --pairs FILE, or --checkpoint URL"),
        ("--pairs p.jsonl --checkpoint c --data d", "one of the two, not both"),
        ("--checkpoint c", "add --data URL"),
        ("--pairs p.jsonl --truth t --limit 3", "--truth, --limit goes with --checkpoint"),
        ("--checkpoint c --data d --uncertain absent", "goes with --pairs"),
        ("--pairs p.jsonl", "cannot be read"),
    ],
)
def test_the_command_takes_exactly_one_form(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "reports", *arguments.split(), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_scores_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        pairs = write_pairs(tmp_path / f"{name}.jsonl", some_pairs(12, seed))
        assert main(["evaluate", "reports", "--pairs", str(pairs), "--out", str(tmp_path / name)]) == 0
    assert "clinical_f1_micro_14" in capsys.readouterr().out
    assert main(["evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "ab")]) == 0
    assert "B - A" in capsys.readouterr().out
    assert main(["evaluate", "compare", str(tmp_path / "a"), str(tmp_path / "none"), "--out", str(tmp_path / "ab")]) == 1
