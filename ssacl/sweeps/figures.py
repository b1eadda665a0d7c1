"""sweep.png: every trial as a line through its values, what mattered, the front, and how trials learned."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssacl.sweeps.config import SweepConfig
from ssacl.sweeps.ledger import Trial

_STATUS = {"finished": "#3366cc", "pruned": "#b8bec6", "failed": "#dc3912", "running": "#ff9900"}
_BEST = "#109618"


def sweep_png(config: SweepConfig, trials: Sequence[Trial], tree: Mapping[str, Any]) -> bytes:
    """The picture of a sweep; `tree` is its table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 12), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    names = list(config.objectives)
    grid = figure.add_gridspec(3, 2 * max(2, len(names)))
    width = grid.ncols // 2
    _parallel(figure.add_subplot(grid[0, :]), config, tree)
    _front(figure.add_subplot(grid[1, :width]), names, tree)
    _importance(figure.add_subplot(grid[1, width:]), names, tree)
    share = grid.ncols // len(names)
    for column, name in enumerate(names):
        _learning(figure.add_subplot(grid[2, column * share : (column + 1) * share]), name, trials, tree)
    for panel in figure.axes:
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _parallel(panel: Any, config: SweepConfig, tree: Mapping[str, Any]) -> None:
    keys, names = list(tree["trials"][0]["values"]), list(config.objectives)
    rows = [row for row in tree["trials"] if row["status"] in ("finished", "pruned")]
    columns: list[NDArray[np.float64]] = []
    ends: list[tuple[str, str]] = []
    for key in keys:
        values = [row["values"][key] for row in rows]
        domain = config.space.get(key)
        numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        logarithmic = domain is not None and domain.log_uniform is not None
        known = sorted({repr(value) for value in values})
        drawn = [float(value) if numbers else float(known.index(repr(value))) for value in values]
        columns.append(_scaled(np.log(drawn) if logarithmic else np.array(drawn)))
        ends.append((f"{min(drawn):.3g}", f"{max(drawn):.3g}") if numbers else (known[0], known[-1]))
    for name in names:
        values = [np.nan if row["objectives"][name] is None else row["objectives"][name] for row in rows]
        columns.append(_scaled(np.array(values, dtype=np.float64)))
        seen = [value for value in values if np.isfinite(value)]
        ends.append((f"{min(seen):.3g}", f"{max(seen):.3g}") if seen else ("", ""))
    for index, row in enumerate(rows):
        best = row["name"] == tree["best"]
        colour = _BEST if best else _STATUS[row["status"]]
        panel.plot([column[index] for column in columns], color=colour, linewidth=2.4 if best else 1.0, alpha=1.0 if best else 0.7)
    labels = [key.rpartition(".")[2] for key in keys] + names
    panel.set_xticks(range(len(labels)), [label.replace("_", "\n") for label in labels], fontsize=7)
    panel.set_yticks([])
    for column, (low, high) in enumerate(ends):
        panel.annotate(low, (column, -0.06), ha="center", fontsize=6, color="#66707a")
        panel.annotate(high, (column, 1.03), ha="center", fontsize=6, color="#66707a")
        panel.axvline(column, color="#d5d9de", linewidth=0.8, zorder=0)
    panel.set_title("every trial (blue: trained to the end, grey: stopped early, green: the best)", fontsize=10)


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    seen = values[np.isfinite(values)]
    if not len(seen) or np.ptp(seen) == 0:
        return np.where(np.isfinite(values), 0.5, np.nan)
    return np.asarray((values - seen.min()) / np.ptp(seen))


def _front(panel: Any, names: Sequence[str], tree: Mapping[str, Any]) -> None:
    if len(names) < 2:
        curve = tree["best_so_far"][names[0]]
        panel.step([spent for spent, _ in curve], [best for _, best in curve], where="post", color=_BEST)
        panel.set_title(f"best {names[0]} so far", fontsize=10)
        panel.set_xlabel("optimizer steps of all trials", fontsize=8)
        return
    across, up = names[:2]
    rows = [row for row in tree["trials"] if row["status"] == "finished" and None not in row["objectives"].values()]
    for row in rows:
        colour = _BEST if row["name"] == tree["best"] else _STATUS["finished"] if row["on_front"] else _STATUS["pruned"]
        panel.plot(row["objectives"][across], row["objectives"][up], "o", color=colour)
        label = "base" if row is tree["trials"][0] else row["name"].rpartition("-")[2]
        panel.annotate(label, (row["objectives"][across], row["objectives"][up]), fontsize=7, xytext=(4, 3), textcoords="offset points")
    front = sorted((row["objectives"][across], row["objectives"][up]) for row in rows if row["on_front"])
    panel.plot([x for x, _ in front], [y for _, y in front], "--", color=_STATUS["finished"], linewidth=0.8)
    panel.set_xlabel(across.replace("_", " "), fontsize=8)
    panel.set_ylabel(up.replace("_", " "), fontsize=8)
    panel.set_title("Pareto front (blue and green; grey is beaten)", fontsize=10)


def _importance(panel: Any, names: Sequence[str], tree: Mapping[str, Any]) -> None:
    shares = {name: tree["importance"][name] for name in names if tree["importance"][name]}
    panel.set_title("share of the ranks that goes with a key", fontsize=10)
    if not shares:
        panel.text(0.5, 0.5, "too few finished trials", ha="center", fontsize=9, color="#66707a")
        return
    keys = list(next(iter(shares.values())))
    for number, (name, share) in enumerate(shares.items()):
        height = 0.8 / len(shares)
        panel.barh(np.arange(len(keys)) + number * height, [share[key] for key in keys], height, label=name.replace("_", " "))
    panel.set_yticks(np.arange(len(keys)) + 0.4 - 0.4 / len(shares), [key.rpartition(".")[2].replace("_", " ") for key in keys])
    panel.set_xlim(0, 1)
    panel.legend(fontsize=7, frameon=False)


def _learning(panel: Any, name: str, trials: Sequence[Trial], tree: Mapping[str, Any]) -> None:
    for trial in trials:
        points = [(record["step"], record[name]) for record in trial.curve if name in record and record["step"] >= trial.forked_at]
        best = trial.name == tree["best"]
        colour = _BEST if best else _STATUS[trial.status]
        panel.plot([x for x, _ in points], [y for _, y in points], ".-", color=colour, linewidth=2.0 if best else 1.0, markersize=4)
    panel.set_title(name.replace("_", " "), fontsize=10)
    panel.set_xlabel("optimizer step, over all stages", fontsize=8)
