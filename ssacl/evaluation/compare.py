"""`ssacl evaluate compare`: two report evaluations of the same cases side by side, with significance.

The difference of a figure stands with its paired bootstrap interval and the p value of approximate randomization: how often a difference as
large arises when each case's two reports change places by chance (Noreen 1989). P values are not corrected for the number of figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ssacl.errors import DataError, StorageError
from ssacl.evaluation.cases import Case, read_cases
from ssacl.evaluation.figures import (
    LEVEL,
    LOWER_IS_BETTER,
    NEITHER_IS_BETTER,
    NUM_RESAMPLES,
    point_figures,
    resampled_figures,
    statistics,
)
from ssacl.evaluation.page import bar, number, page, table
from ssacl.evaluation.scorecard import read_card
from ssacl.inference.files import write_whole

NUM_SWAPS = 2000
_SWAPS_AT_ONCE = 50
_POLICIES = ("uncertain", "labeler", "chexbert", "tokenisation", "text_scorer", "truncation")
_SAME_DATA = ("split", "data_set_sha256")


def compare(first: str | Path, second: str | Path, out_folder: str | Path, seed: int = 0) -> dict[str, Any]:
    """Compare the evaluations of two folders; writes comparison.json and comparison.html.

    Returns
    -------
    dict
        `figures`: name -> `a`, `b`, `difference` (b - a), its interval `low`, `high`, `p`, and which is `better` where p < 0.05.

    Raises
    ------
    DataError
        A folder holds no finished evaluation, or the two are not of the same cases, references, data or policies.
    StorageError
        The disk is full or refuses.
    """
    cards = [read_card(folder) for folder in (first, second)]
    ours, theirs = read_cases(first), read_cases(second)
    for card, cases, folder in zip(cards, (ours, theirs), (first, second), strict=True):
        if card["data"]["num_cases"] - card.get("num_without_report", 0) != len(cases):
            raise DataError(f"{folder} holds {len(cases)} cases and a card of {card['data']['num_cases']}; run that evaluation again.")
    _same_policies(*cards)
    _same_data(*cards)
    theirs = _aligned(ours, theirs)
    tree = {
        "format": 1,
        "a": _described(cards[0]),
        "b": _described(cards[1]),
        "num_cases": len(ours),
        "uncertain": cards[0]["uncertain"],
        "interval": {"method": "paired bootstrap over cases", "level": LEVEL, "resamples": NUM_RESAMPLES},
        "test": {"method": "approximate randomization over cases, two-sided, not corrected for several figures", "swaps": NUM_SWAPS},
        "seed": seed,
        "figures": paired_figures(ours, theirs, cards[0]["uncertain"], seed),
    }
    out = Path(out_folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"The output folder {out} cannot be used ({error.strerror}). Give another --out.") from error
    write_whole(out / "comparison.html", _page(tree).encode())
    write_whole(out / "comparison.json", json.dumps(tree, indent=1, allow_nan=False).encode())
    return tree


def paired_figures(ours: Sequence[Case], theirs: Sequence[Case], uncertain: Any, seed: int) -> dict[str, dict[str, Any]]:
    """Figures of both systems on the same cases in the same order, with interval and p value of the difference (theirs - ours)."""
    a, b = statistics(ours, uncertain), statistics(theirs, uncertain)
    points_a, points_b = point_figures(a), point_figures(b)
    resampled_a, resampled_b = (resampled_figures(each, seed, NUM_RESAMPLES) for each in (a, b))
    num_larger = dict.fromkeys(points_a, 0)
    rng = np.random.default_rng([seed, 1])
    for start in range(0, NUM_SWAPS, _SWAPS_AT_ONCE):
        stays = rng.integers(2, size=(min(_SWAPS_AT_ONCE, NUM_SWAPS - start), len(ours))).astype(np.float64)
        mixed = [each.figures(stays @ one.values + (1 - stays) @ other.values) for each, one, other in ((a, a, b), (b, b, a))]
        for name in points_a:
            num_larger[name] += _num_as_large(mixed[1][name] - mixed[0][name], points_a[name], points_b[name])
    found: dict[str, dict[str, Any]] = {}
    for name, value in points_a.items():
        other = points_b[name]
        row: dict[str, Any] = {"a": value, "b": other, "difference": None, "low": None, "high": None, "p": None, "better": None}
        if value is not None and other is not None:
            difference = resampled_b[name] - resampled_a[name]
            if np.isfinite(difference).all():
                row["low"], row["high"] = (float(each) for each in np.quantile(difference, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
            row |= {"difference": other - value, "p": (num_larger[name] + 1) / (NUM_SWAPS + 1)}
            row["better"] = _better(name, row["difference"], row["p"])
        found[name] = row
    return found


def print_comparison(tree: Mapping[str, Any], figures: Sequence[str], console: Console | None = None) -> None:
    """A table of the main `figures` for people."""
    shown = Table(title=f"{tree['num_cases']} cases; A: {tree['a']['name']}; B: {tree['b']['name']}")
    shown.add_column("figure", no_wrap=True)
    for name in ("A", "B", "B - A", "95 % interval", "p", "better"):
        shown.add_column(name, justify="right")
    for name in figures:
        row = tree["figures"].get(name)
        if row is None or row["difference"] is None:
            continue
        interval = "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
        cells = (f"{row['a']:.3f}", f"{row['b']:.3f}", f"{row['difference']:+.3f}", interval, f"{row['p']:.4f}", row["better"] or "")
        shown.add_row(name, *cells)
    (console or Console()).print(shown)


def _same_policies(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    differ = [f"{name} ({a.get(name)} and {b.get(name)})" for name in _POLICIES if a.get(name) != b.get(name)]
    if differ:
        raise DataError(f"The evaluations follow other policies: {'; '.join(differ)}. Evaluate both in the same way, then compare.")


def _same_data(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Where both name a data set or a split, it must be the same."""
    data = [card["data"] if card["checkpoint"] is None else card["data"] | {"data_set_sha256": card["data"]["sha256"]} for card in (a, b)]
    for name in _SAME_DATA:
        values = [each.get(name) for each in data]
        if None not in values and values[0] != values[1]:
            what = "splits" if name == "split" else "data sets (their hashes differ)"
            raise DataError(f"The evaluations are of different {what}: {values[0]} and {values[1]}. Compare two on the same data.")


def _aligned(ours: Sequence[Case], theirs: Sequence[Case]) -> list[Case]:
    """Their cases in our order."""
    by_id = {case.id: case for case in theirs}
    known = {case.id for case in ours}
    only_a, only_b = len(known - by_id.keys()), len(by_id.keys() - known)
    if only_a or only_b:
        raise DataError(
            f"The evaluations are of different cases: {only_a} ids are in A alone, {only_b} in B alone. Compare two on the same."
        )
    num_other = sum(case.reference != by_id[case.id].reference for case in ours)
    if num_other:
        raise DataError(
            f"{num_other} of {len(ours)} references differ between the evaluations (other sections, or cut). Score both against the same."
        )
    return [by_id[case.id] for case in ours]


def _num_as_large(mixed: NDArray[np.float64], a: float | None, b: float | None) -> int:
    if a is None or b is None:
        return 0
    # Rounding must not make an equal difference smaller; a figure that a shuffle does not have counts against significance.
    return int((~(np.abs(mixed) < abs(b - a) - 1e-12)).sum())


def _better(name: str, difference: float, p: float) -> str | None:
    if p >= 0.05 or difference == 0 or name in NEITHER_IS_BETTER:
        return None
    return "B" if (difference > 0) != (name in LOWER_IS_BETTER) else "A"


def _described(card: Mapping[str, Any]) -> dict[str, Any]:
    checkpoint = card["checkpoint"]
    name = f"pairs {card['data']['sha256'][:12]}" if checkpoint is None else f"model {checkpoint['model_version']}"
    return {"name": name, "data": card["data"], "checkpoint": checkpoint}


def _page(tree: Mapping[str, Any]) -> str:
    rows = []
    for name, row in tree["figures"].items():
        interval = "" if row["low"] is None else f"{row['low']:+.3f} to {row['high']:+.3f}"
        p = "" if row["p"] is None else f"{row['p']:.4f}"
        bars = f"{bar(row['a'], None)}<br>{bar(row['b'], None)}"
        rows.append([escape(name), number(row["a"]), number(row["b"]), number(row["difference"]), interval, p, row["better"] or "", bars])
    said = [[key, escape(json.dumps(tree[key]))] for key in ("a", "b", "num_cases", "uncertain", "interval", "test", "seed")]
    head = ["figure", "A", "B", "B - A", "95 % interval", "p", "better", "A over B"]
    return page(
        f"Comparison on {tree['num_cases']} cases: {tree['a']['name']} and {tree['b']['name']}",
        [table(["", ""], said), table(head, rows, numbers=(1, 2, 3, 4, 5))],
    )
