"""A score card, or a comparison of two, as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ssacl.inference.files import write_whole

FILE_NAME = "scorecard.html"
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:68rem;padding:0 1rem;color:#1b1f24;background:#fff}
table{border-collapse:collapse;margin:.6rem 0 1.4rem}th,td{padding:.18rem .7rem;text-align:left;border-bottom:1px solid #e3e6ea}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.warn{background:#fff4d6;padding:.5rem .8rem;border-left:4px solid #e0a800}.pair{display:flex;gap:1.5rem}.pair>div{flex:1}
.text{white-space:pre-wrap;background:#f6f7f9;padding:.5rem .7rem}img{max-width:100%}.faint{color:#66707a}svg{vertical-align:middle}
"""
_WARNING = "Research software, not a medical device. Reports and pictures on this page may be patients' data: keep it as private as those."
_NOT_SHOWN = ("metrics", "intervals", "rows", "details", "versions", "shown", "config", "thresholds", "checkpoint", "data", "format")


@dataclass(frozen=True)
class ShownCase:
    """One case for the page."""

    kind: str
    """"best", "median" or "worst"."""
    id: str
    prediction: str
    reference: str
    sheet_png: bytes | None = None
    """Evidence sheet, where a checkpoint is at hand."""


def write_page(card: Mapping[str, Any], cases: Sequence[ShownCase], folder: str | Path) -> Path:
    """Write `folder/scorecard.html`, whole or not at all; the folder is there.

    Raises
    ------
    StorageError
        The disk is full or refuses.
    """
    path = Path(folder) / FILE_NAME
    write_whole(path, card_page(card, cases).encode())
    return path


def card_page(card: Mapping[str, Any], cases: Sequence[ShownCase]) -> str:
    """The page of a card."""
    data = card["data"]
    identity = {f"data: {key}": value for key, value in data.items()}
    identity |= {f"checkpoint: {key}": value for key, value in (card["checkpoint"] or {"": "not stated"}).items() if key != "files_sha256"}
    identity |= {key: value for key, value in card.items() if key not in _NOT_SHOWN}
    identity["versions"] = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    known = {row["figure"]: row for row in card["rows"]}
    main = [(name, card["metrics"][name], known[name]["baseline"], known[name]["baseline_name"]) for name in known]
    rest = [(name, value, None, None) for name, value in card["metrics"].items() if name not in known]
    parts = [
        table(["", ""], [[escape(key), escape(_plain(value))] for key, value in identity.items()]),
        "<h2>Figures</h2>",
        _figures(main, card.get("intervals", {})),
        f"<details><summary>All {len(main) + len(rest)} figures</summary>{_figures(rest, card.get('intervals', {}))}</details>",
        *_clinical(card["details"].get("clinical", {})),
        *_config(card.get("config")),
    ]
    if cases:
        parts.append(f"<h2>Best, median and worst cases</h2><p class=faint>Ranked by the {escape(card['shown']['ranked_by'])}.</p>")
        parts += [_case(case) for case in cases]
    return page(f"Score card: {card['task']}, {data['split'] or 'no'} split, {data['num_cases']} cases", parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page; `parts` are HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="warn">{_WARNING}</p>{"".join(parts)}</body></html>\n'
    )


def _figures(rows: Sequence[tuple[str, Any, Any, Any]], intervals: Mapping[str, Any]) -> str:
    cells = []
    for name, value, baseline, baseline_name in rows:
        interval = intervals.get(name)
        spread = f"{number(interval[0])} to {number(interval[1])}" if interval else ""
        best = "" if baseline is None else f"{number(baseline)} ({escape(str(baseline_name))})"
        cells.append([escape(name), number(value), spread, bar(value, interval), best])
    return table(["figure", "value", "95 % interval", "0 to 1", "best baseline"], cells, numbers=(1, 2))


def bar(value: float | None, interval: Sequence[float] | None) -> str:
    """A value of 0..1 as a drawn bar with its interval; nothing for others."""
    if value is None or not 0 <= value <= 1:
        return ""
    whisker = ""
    if interval:
        low, high = (120 * min(max(end, 0.0), 1.0) for end in interval)
        whisker = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="6" y2="6" stroke="#1b1f24" stroke-width="2"/>'
    return (
        '<svg width="120" height="12"><rect width="120" height="12" fill="#eef0f3"/>'
        f'<rect width="{120 * value:.1f}" height="12" fill="#8fb7e3"/>{whisker}</svg>'
    )


def _clinical(scores: Mapping[str, Any]) -> list[str]:
    parts = []
    for labeler, score in scores.items():
        rows = [
            [escape(name), *(number(each[key]) for key in ("precision", "recall", "f1")), each["support"]]
            for name, each in score["findings"].items()
        ]
        parts += [f"<h2>Findings stated, per finding ({escape(labeler)})</h2>"]
        parts.append(table(["finding", "precision", "recall", "F1", "cases"], rows, numbers=(1, 2, 3, 4)))
    return parts


def _config(config: Any) -> list[str]:
    if not config:
        return []
    return [f"<details><summary>Configuration of the checkpoint</summary><pre>{escape(json.dumps(config, indent=1))}</pre></details>"]


def _case(case: ShownCase) -> str:
    picture = ""
    if case.sheet_png is not None:
        picture = f'<img alt="film and evidence" src="data:image/png;base64,{base64.b64encode(case.sheet_png).decode()}">'
    return (
        f"<h3>{escape(case.kind)} <span class=faint>{escape(case.id)}</span></h3><div class=pair>"
        f"<div>prediction<div class=text>{escape(case.prediction) or '(empty)'}</div></div>"
        f"<div>reference<div class=text>{escape(case.reference)}</div></div></div>{picture}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; columns `numbers` are set to the right."""
    kind = [' class="n"' if column in numbers else "" for column in range(len(head))]
    titles = "".join(f"<th{kind[column]}>{escape(title)}</th>" for column, title in enumerate(head)) if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td{kind[column]}>{cell}</td>" for column, cell in enumerate(row)) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"


def number(value: float | None) -> str:
    """Three decimals; a dash where there is no figure."""
    return "&ndash;" if value is None else f"{value:.3f}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return "none" if value is None else str(value)
