"""The score card: one JSON file that says what was measured, on what, under which policies, and a table for the terminal.

`ssacl.evaluation.page` makes a page of it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import ssacl
from ssacl.errors import DataError, StorageError
from ssacl.evaluation.roc import mean_area
from ssacl.evaluation.study_set import SplitEvaluation
from ssacl.evaluation.text import SCORER, TOKENISATION
from ssacl.inference.files import write_whole
from ssacl.scores.clinical import GROUPS

FILE_NAME = "scorecard.json"
FORMAT = 2
PAIRS_NOT_STATED = "not stated: the file of pairs does not say"
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pycocoevalcap")
_LUNGS = ("right lung", "left lung")
MAIN_FIGURES = (
    *("clinical_f1_micro_14", "clinical_f1_macro_14", "clinical_f1_micro_5", "clinical_f1_macro_5", "clinical_f1_example_14"),
    *("chexbert_f1_micro_14", "chexbert_f1_macro_14", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "meteor"),
    *("distinct_share", "most_common_share", "mean_tokens", "mean_tokens_reference", "sides_compared", "sides_wrong_share"),
    *("prior_share", "prior_unbacked_share", "empty_share", "truncated_share"),
)


def make_card(evaluation: SplitEvaluation, reports: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The card of a checkpoint's evaluation: a plain JSON tree.

    `metrics` holds the model's figures by name, `intervals` those of reports, `rows` the main figures beside the best baseline of each,
    `details` every score. `reports` is what `ssacl.evaluation.report_scores.report_figures` says of the drafts.
    """
    rows = summary_rows(evaluation.metrics)
    figures = {row["figure"]: row["model"] for row in rows}
    return _card({**evaluation.identity, "task": "reports"}, figures, evaluation.metrics, reports or {}) | {"rows": rows}


def make_pairs_card(identity: Mapping[str, Any], reports: Mapping[str, Any]) -> dict[str, Any]:
    """The card of a file of pairs; `identity` names data, policies and seed, `reports` is of `report_figures`."""
    card = _card({**identity, "task": "reports", "checkpoint": None, "sections": PAIRS_NOT_STATED}, {}, {}, reports)
    rows = [
        {"figure": name, "model": card["metrics"][name], "baseline": None, "baseline_name": None}
        for name in MAIN_FIGURES
        if name in card["metrics"]
    ]
    return card | {"rows": rows}


def _card(identity: dict[str, Any], metrics: dict[str, Any], details: Mapping[str, Any], reports: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in reports.items() if name not in ("metrics", "clinical", "references_sha256")}
    data = identity["data"] | ({"references_sha256": reports["references_sha256"]} if reports else {})
    return {
        "format": FORMAT,
        **identity,
        "data": data,
        "truncation": "none",
        "text_scorer": SCORER,
        "tokenisation": TOKENISATION,
        "versions": installed_versions(_PACKAGES),
        "metrics": metrics | reports.get("metrics", {}),
        **own,
        "details": dict(details) | ({"clinical": reports["clinical"]} if reports else {}),
    }


def summary_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Main figures of `SplitEvaluation.metrics`: `figure`, `model`, `baseline` (the best one's value), `baseline_name`.

    All figures are better when higher. `clinical_...` is what the reports state against what the radiologists' reports state;
    `true_findings_...` the same against what is in the picture, where there is truth.
    """
    rows: list[dict[str, Any]] = []
    findings = metrics["findings"]
    for group in GROUPS:
        for mean in ("micro", "macro"):
            rows.append(_row(f"findings_f1_{mean}_{group}", "head", {name: each[f"f1_{mean}_{group}"] for name, each in findings.items()}))
    if areas := metrics.get("findings_auc"):
        rows += [_row(f"findings_auc_{group}", "head", {"head": mean_area(areas, group), "constant": 0.5}) for group in GROUPS]
    if reports := metrics.get("reports"):
        against = reports["findings_against"]
        for name, what in (("clinical", "reference_reports"), ("true_findings", "truth"), ("chexbert", "reference_reports_by_chexbert")):
            for group in GROUPS if what in against else ():
                for mean in ("micro", "macro"):
                    values = {system: each[f"f1_{mean}_{group}"] for system, each in against[what].items()}
                    rows.append(_row(f"{name}_f1_{mean}_{group}", "model", values))
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"Cannot write {path}: {error.strerror}. Free space or choose another folder with --out.") from error
    write_whole(path, json.dumps(card, indent=1, allow_nan=False).encode())
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
    """The card's table, and what its figures depend on, for people."""
    target, data = console or Console(), card["data"]
    target.print(card_table(card))
    against = f"findings against {card['findings_against']}; " if "findings_against" in card else ""
    target.print(
        f"{against}uncertain counts as {card['uncertain']}; labeler {card['labeler']}; sections: {card['sections']}; "
        f"references whole; data {data['sha256'][:12]}"
    )


def card_table(card: Mapping[str, Any]) -> Table:
    """Each figure with its interval, beside its best baseline where there is one."""
    data, checkpoint, intervals = card["data"], card["checkpoint"], card.get("intervals", {})
    model = "report pairs" if checkpoint is None else f"model {checkpoint['model_version']}"
    table = Table(title=f"{data['split'] or 'no'} split, {data['num_cases']} cases, {model}")
    table.add_column("figure")
    for name in ("model", "95 % interval", *(() if checkpoint is None else ("best baseline",))):
        table.add_column(name, justify="right")
    if checkpoint is not None:
        table.add_column("which")
    for row in card["rows"]:
        interval = intervals.get(row["figure"])
        cells = [row["figure"], _shown(row["model"]), f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""]
        table.add_row(*cells, *(() if checkpoint is None else (_shown(row["baseline"]), row["baseline_name"] or "")))
    return table


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
