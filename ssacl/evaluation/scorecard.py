"""The score card: one JSON file that says what was measured, on what, under which policies, and a table for the terminal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import ssacl
from ssacl.errors import DataError, StorageError
from ssacl.evaluation.study_set import SplitEvaluation
from ssacl.evaluation.text import SCORER, TOKENISATION

FILE_NAME = "scorecard.json"
FORMAT = 1
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pycocoevalcap")
_LUNGS = ("right lung", "left lung")


def make_card(evaluation: SplitEvaluation) -> dict[str, Any]:
    """The card of an evaluation: a plain JSON tree.

    `metrics` holds the model's main figures by name, `rows` the same beside the best baseline of each, `details` every score.
    """
    rows = summary_rows(evaluation.metrics)
    return {
        "format": FORMAT,
        **evaluation.identity,
        "truncation": "none",
        "text_scorer": SCORER,
        "tokenisation": TOKENISATION,
        "versions": installed_versions(_PACKAGES),
        "metrics": {row["figure"]: row["model"] for row in rows},
        "rows": rows,
        "details": evaluation.metrics,
    }


def summary_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Main figures of `SplitEvaluation.metrics`: `figure`, `model`, `baseline` (the best one's value), `baseline_name`.

    All figures are better when higher. Findings of reports count against the truth where there is one.
    """
    rows: list[dict[str, Any]] = []
    findings = metrics["findings"]
    for group in ("14", "13", "5"):
        for mean in ("micro", "macro"):
            rows.append(_row(f"findings_f1_{mean}_{group}", "head", {name: each[f"f1_{mean}_{group}"] for name, each in findings.items()}))
    if reports := metrics.get("reports"):
        against = reports["findings_against"]
        stated = against.get("truth", against["reference_reports"])
        for group in ("14", "13", "5"):
            for mean in ("micro", "macro"):
                values = {name: each[f"f1_{mean}_{group}"] for name, each in stated.items()}
                rows.append(_row(f"clinical_f1_{mean}_{group}", "model", values))
        for score in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"):
            rows.append(_row(score, "model", {name: each[score] for name, each in reports["text"].items()}))
        rows.append(_row("distinct_share", "model", {"model": reports["diversity"]["model"]["distinct_share"]}))
    if maps := metrics.get("maps"):
        for measure in ("pointing", "iou"):
            for node in _LUNGS:
                values = {name: each["nodes"][node][measure] for name, each in maps.items()}
                rows.append(_row(f"{node.replace(' ', '_')}_{measure}", "model", values))
            for group in ("leaves", "all"):
                rows.append(_row(f"{group}_{measure}", "model", {name: each["means"][group][measure] for name, each in maps.items()}))
    return rows


def write_card(card: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `folder/scorecard.json`, whole or not at all.

    Raises
    ------
    StorageError
        The disk is full or refuses.
    """
    path = Path(folder) / FILE_NAME
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(card, indent=1, allow_nan=False), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"Cannot write {path}: {error.strerror}. Free space or choose another folder with --out.") from error
    return path


def read_card(path: str | Path) -> dict[str, Any]:
    """A card from its file, or from the folder that holds it.

    Raises
    ------
    DataError
        There is none, or it is not of this format.
    """
    file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not a readable score card; make one with `ssacl evaluate reports`.") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise DataError(f"{file} is not a score card of format {FORMAT}; evaluate again with this release.")
    return card


def print_card(card: Mapping[str, Any], console: Console | None = None) -> None:
    """A table for people: each figure beside its best baseline."""
    data = card["data"]
    table = Table(title=f"{data['split']} split, {data['num_cases']} cases, model {card['checkpoint']['model_version']}")
    table.add_column("figure")
    for name in ("model", "best baseline"):
        table.add_column(name, justify="right")
    table.add_column("which")
    for row in card["rows"]:
        table.add_row(row["figure"], _shown(row["model"]), _shown(row["baseline"]), row["baseline_name"] or "")
    target = console or Console()
    target.print(table)
    target.print(
        f"findings against {card['findings_against']}; uncertain counts as {card['uncertain']}; sections: {card['sections']}; "
        f"references whole; data {data['sha256'][:12]}"
    )


def _row(figure: str, model: str, values: Mapping[str, float | None]) -> dict[str, Any]:
    others = {name: value for name, value in values.items() if name != model and value is not None}
    best = max(others, key=lambda name: others[name], default=None)
    return {"figure": figure, "model": values[model], "baseline": None if best is None else others[best], "baseline_name": best}


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def installed_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of ssacl, Python and those of `packages` that are installed: what figures depend on."""
    found = {"ssacl": ssacl.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
