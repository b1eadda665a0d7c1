"""The labeler against truth: the phantom's generator, and sentences of real reports that were labelled by hand.

python -m benchmarks.labeler [--real DIR --labels FILE] [--num-phantoms N]

DIR holds reports.csv (columns uid, findings, impression). FILE is a CSV that lies anywhere: `sentence` (UID/FIELD/INDEX, numbered as
`split_sentences` does), `sha256` (first 16 digits, of the sentence's text), `drawn` (how it was drawn), and a column per finding with 1
present, 0 absent, -1 uncertain, empty: unmentioned. No text of a report is in the record.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.anatomy import FINDINGS, NO_FINDING, FindingStatus
from ssacl.data.labeler import label_report
from ssacl.data.reports import split_sections, split_sentences
from ssacl.errors import DataError
from ssacl.phantom.findings import TrueFinding, draw_findings
from ssacl.phantom.reports import write_report

NAMES = tuple(name for name in FINDINGS if name != NO_FINDING)
STATUSES = (FindingStatus.PRESENT, FindingStatus.ABSENT, FindingStatus.UNCERTAIN)
NUM_RESAMPLES = 2000
_VALUES = {"": FindingStatus.UNMENTIONED, "1": FindingStatus.PRESENT, "0": FindingStatus.ABSENT, "-1": FindingStatus.UNCERTAIN}
Status = NDArray[np.int64]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder with reports.csv")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="labels by hand of sentences in it")
    parser.add_argument("--num-phantoms", type=int, default=5000, metavar="N", help="phantom reports to label")


def measure(options: argparse.Namespace) -> Measurement:
    """Label, compare, time.

    Raises
    ------
    DataError
        Reports or labels are missing, do not fit each other, or hold something else.
    """
    if (options.real is None) != (options.labels is None):
        raise DataError("Labels and reports go together; give both --real DIR and --labels FILE.")
    num_phantoms = 200 if options.quick else options.num_phantoms
    phantom_reports, truth = phantoms(num_phantoms)
    figures: dict[str, Any] = {}
    timed = phantom_reports
    if options.real is not None:
        rows = real_reports(options.real)
        timed = [(row["findings"], row["impression"]) for row in rows.values()]
        figures["speed"] = speed(timed)
        figures["real"] = real_figures(rows, options.labels)
    else:
        figures["speed"] = speed(timed)
    figures["phantom"] = phantom_figures(phantom_reports, truth)
    goals = {
        "phantom.micro.present.f1": Goal(min=0.99),
        "phantom.micro.uncertain.f1": Goal(min=0.99),
        "speed.reports_per_s": Goal(min=1000),
    }
    config = {"num_phantoms": num_phantoms, "timed_reports": len(timed), "num_resamples": NUM_RESAMPLES}
    return Measurement(figures=figures, goals=goals, config=config, n=len(timed))


def speed(reports: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Reports per second of CPU time, one thread: each report for the first time, and again with its sentences in the cache."""
    figures = {}
    for name in ("reports_per_s", "reports_per_s_seen_before"):
        start = time.process_time()
        for findings, impression in reports:
            label_report(findings, impression)
        figures[name] = round(len(reports) / (time.process_time() - start), 1)
    return figures


def phantoms(count: int) -> tuple[list[tuple[str, str]], list[list[TrueFinding]]]:
    """Sections and true findings of `count` phantom reports; no picture is drawn."""
    reports, truth = [], []
    for index in range(count):
        rng = np.random.default_rng([0, index])
        found = draw_findings(rng)
        sections = split_sections(write_report(found, "PA", bool(index % 2), rng))
        reports.append((sections.findings, sections.impression))
        truth.append(found)
    return reports, truth


def phantom_figures(reports: Sequence[tuple[str, str]], truth: Sequence[Sequence[TrueFinding]]) -> dict[str, Any]:
    """Present and uncertain against what was drawn; of a denial, only whether it is right: truth does not tell what a report leaves out."""
    true = np.full((len(truth), len(NAMES)), int(FindingStatus.UNMENTIONED), dtype=np.int64)
    for row, found in zip(true, truth, strict=True):
        for item in sorted(found, key=lambda item: item.certainty == "present"):
            row[NAMES.index(item.name)] = FindingStatus.PRESENT if item.certainty == "present" else FindingStatus.UNCERTAIN
    predicted = np.array([label_report(*report).labels[: len(NAMES)] for report in reports], dtype=np.int64)
    denied = predicted == FindingStatus.ABSENT
    figures = scores(true, predicted, STATUSES[::2])
    figures["absent_precision"] = _ratio(int((denied & (true == FindingStatus.UNMENTIONED)).sum()), int(denied.sum()))
    figures["num_reports"] = len(reports)
    return figures


def real_reports(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of `folder/reports.csv` by uid."""
    rows = _rows(folder / "reports.csv", ("uid", "findings", "impression"))
    return {row["uid"]: row for row in rows}


def real_figures(reports: dict[str, dict[str, str]], path: Path) -> dict[str, Any]:
    """Agreement with the labels in `path`, over all of its sentences and by how they were drawn, with 95 % bootstrap intervals."""
    rows = _rows(path, ("sentence", "sha256", "drawn", *NAMES))
    if not rows or len({row["sentence"] for row in rows}) != len(rows):
        raise DataError(f"{path.name} is empty or names a sentence twice; expected one row for each sentence.")
    true = np.array([[_value(row, name, path) for name in NAMES] for row in rows], dtype=np.int64)
    predicted = np.array([label_report(_sentence(row, reports, path)).labels[: len(NAMES)] for row in rows], dtype=np.int64)
    figures = scores(true, predicted, STATUSES, intervals=True)
    drawn = np.array([row["drawn"] for row in rows])
    figures["micro_by_draw"] = {
        str(how): {"num_sentences": int((drawn == how).sum()), **scores(true[drawn == how], predicted[drawn == how], STATUSES)["micro"]}
        for how in sorted(set(drawn))
    }
    figures["num_sentences"] = len(rows)
    figures["sentences_with_every_status_right"] = round(float((true == predicted).all(axis=1).mean()), 4)
    figures["labels_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return figures


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path.name} has no column {', '.join(missing)}; see `python -m benchmarks.labeler --help`.")
            return [dict(row) for row in reader]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read as a CSV file; give the file that --help describes.") from error


def _value(row: dict[str, str], name: str, path: Path) -> FindingStatus:
    try:
        return _VALUES[row[name].strip()]
    except KeyError:
        raise DataError(f"{path.name}, {row['sentence']}, {name}: expected 1, 0, -1 or nothing.") from None


def _sentence(row: dict[str, str], reports: dict[str, dict[str, str]], path: Path) -> str:
    uid, _, place = row["sentence"].partition("/")
    field, _, index = place.partition("/")
    texts = split_sentences(reports[uid][field]) if uid in reports and field in ("findings", "impression") else []
    text = texts[int(index)] if index.isdecimal() and int(index) < len(texts) else ""
    if hashlib.sha256(text.encode()).hexdigest()[:16] != row["sha256"]:
        raise DataError(
            f"{path.name}: sentence {row['sentence']} is not the one that was labelled; use the same reports, and label anew where the "
            "splitter has changed."
        )
    return text


def scores(true: Status, predicted: Status, statuses: Sequence[FindingStatus], intervals: bool = False) -> dict[str, Any]:
    """Precision, recall, F1 and counts of each status: `micro` over all findings, and `findings` one by one.

    Parameters
    ----------
    true, predicted
        [n, 13] `FindingStatus`.
    """
    micro: dict[str, Any] = {}
    each: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    for status in statuses:
        # [n, 13, 3]: right, predicted, true.
        is_true, is_predicted = true == status, predicted == status
        counts = np.stack([is_true & is_predicted, is_predicted, is_true], axis=-1).astype(np.int64)
        key = status.name.lower()
        micro[key] = _score(counts.sum(axis=(0, 1)))
        if intervals:
            micro[key]["f1_95"] = _interval(counts.sum(axis=1))
        for index, name in enumerate(NAMES):
            total = counts[:, index].sum(axis=0)
            if total.any():
                each[name][key] = _score(total)
    return {"micro": micro, "findings": {name: values for name, values in each.items() if values}}


def _score(counts: NDArray[np.int64]) -> dict[str, Any]:
    right, predicted, true = (int(value) for value in counts)
    return {
        "precision": _ratio(right, predicted),
        "recall": _ratio(right, true),
        "f1": _ratio(2 * right, predicted + true),
        "num_true": true,
        "num_predicted": predicted,
        "num_right": right,
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _interval(by_sentence: NDArray[np.int64]) -> list[float]:
    """2.5 % and 97.5 % of F1 over resampled sentences; a resample without the status does not count."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(by_sentence), size=(NUM_RESAMPLES, len(by_sentence)))
    right, predicted, true = by_sentence[rows].sum(axis=1).T
    whole = predicted + true
    f1 = 2 * right[whole > 0] / whole[whole > 0]
    return [round(float(value), 4) for value in np.quantile(f1, (0.025, 0.975))] if len(f1) else []


if __name__ == "__main__":
    sys.exit(run_benchmark("labeler", measure, add_arguments, description=__doc__))
