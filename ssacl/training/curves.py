"""training.png: the losses, the speed and the learning rate of a run, from its metrics."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssacl.errors import TrainingError

_COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900", "#0099c6", "#6a4c93", "#8c564b", "#7f7f7f", "#bcbd22")


def curves_png(records: Iterable[Mapping[str, Any]]) -> bytes:
    """One panel per stage (training losses as lines, validation as dots), a panel for images/s and one for the learning rate.

    Parameters
    ----------
    records : the run's metrics, as `MetricsLog` keeps them.

    Raises
    ------
    TrainingError
        There is no step among the records.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(records)
    steps = [record for record in records if record["event"] == "step"]
    if not steps:
        raise TrainingError("The metrics hold no training step, so there is no curve to draw. Run the training first.")
    stages = sorted({(record["stage_index"], record["stage"]) for record in steps})
    num_panels = len(stages) + 2
    columns = min(3, num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (index, stage) in zip(panels, stages, strict=False):
        own = [record for record in steps if record["stage_index"] == index]
        checks = [record for record in records if record["event"] == "validation" and record["stage_index"] == index]
        names = [name for name in own[0]["losses"] if "/" not in name and (name != "total" or len(own[0]["losses"]) > 2)]
        for number, name in enumerate(names):
            colour = _COLOURS[number % len(_COLOURS)]
            panel.plot(
                [r["step"] for r in own], [r["losses"][name] for r in own], color=colour, linewidth=1.2, label=name.replace("_", " ")
            )
            panel.plot([r["step"] for r in checks], [r["losses"][name] for r in checks], "o", color=colour, markersize=4)
        panel.set_title(f"{index + 1}. {stage}", fontsize=10)
        if len(names) > 1:
            panel.set_yscale("symlog", linthresh=0.1)
        panel.legend(fontsize=7, frameon=False)
        panel.set_xlabel("optimizer step (lines: training, dots: validation)", fontsize=8)
    speed, rate = panels[len(stages)], panels[len(stages) + 1]
    elapsed_min = [record["elapsed_s"] / 60 for record in steps]
    speed.plot(elapsed_min, [record["images_per_s"] for record in steps], color=_COLOURS[0], linewidth=1.2)
    speed.set_title("images/s, all ranks", fontsize=10)
    rate.plot(elapsed_min, [record["lr"] for record in steps], color=_COLOURS[1], linewidth=1.2)
    rate.set_title("learning rate (largest group)", fontsize=10)
    for panel in (speed, rate):
        panel.set_xlabel("minutes", fontsize=8)
        panel.set_ylim(bottom=0)
    for panel in panels:
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[num_panels:]:
        panel.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_curves(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """`curves_png` to a file, atomically."""
    content = curves_png(records)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
