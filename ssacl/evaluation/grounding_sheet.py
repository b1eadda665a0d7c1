"""A contact sheet of an evaluation: for each anatomy or finding the best, the median and the worst case, with map, box and mask drawn.

Films are shown as they are stored, in the model's square: the patient's right is on the viewer's left.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ssacl.data.dicom import read_picture
from ssacl.data.transforms import load_square
from ssacl.evaluation.annotations import Film, square_target
from ssacl.evaluation.film_answers import Answer, film_pose
from ssacl.evaluation.film_grounding import GroupResult
from ssacl.inference.film import BACKGROUND, FAINT, INK, blend, draw_film, printable
from ssacl.inference.maps import box_of_map
from ssacl.inference.report import Box

MAX_GROUPS = 6
RANKED_BY = "average_precision"
_SHOWN_PX = 256
_PLACES = ("best", "median", "worst")
_TRUTH, _BOX = "#8ac926", "#4cc9f0"


def contact_sheet_png(
    films: Sequence[Film],
    results: Sequence[GroupResult],
    answers: Mapping[str, Sequence[Answer]],
    condition: str,
    seed: int = 0,
    system: str = "model",
) -> bytes:
    """The sheet of one condition: the groups with the most cases, ranked by average precision. Phrases are not written out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted(results, key=lambda result: -len(result.rows))[:MAX_GROUPS]
    figure = Figure(figsize=(10.5, 3.7 * len(shown) + 0.7), dpi=80, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), len(_PLACES), squeeze=False)
    for row, result in zip(axes, shown, strict=True):
        values = result.systems[system].cases[RANKED_BY]
        order = np.argsort(-values, kind="stable")
        for panel, place, case in zip(row, _PLACES, (order[0], order[len(order) // 2], order[-1]), strict=True):
            _draw(panel, films, result, answers[condition], condition, int(case), seed)
            panel.set_title(printable(f"{result.group.name}: {place}, AP {values[case]:.2f}"), color=INK, fontsize=9, parse_math=False)
    legend = f"condition {condition}; heat: map; green: drawn truth; blue: box of the map; patient's right on the viewer's left"
    figure.text(0.01, 0.004, legend, color=FAINT, fontsize=8)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=BACKGROUND, metadata={"Software": None})
    return buffer.getvalue()


def _draw(panel: Any, films: Sequence[Film], result: GroupResult, answers: Sequence[Answer], condition: str, case: int, seed: int) -> None:
    from matplotlib.patches import Rectangle

    row = int(result.rows[case])
    film, target = films[result.group.films[row]], result.group.targets[row]
    pose = film_pose(film, condition, seed)
    square, _ = load_square(read_picture(film.path.read_bytes(), film.path.name).pixels, _SHOWN_PX)
    image = (pose.moved_image(square) * 255).round().clip(0, 255).astype(np.uint8)
    raw = answers[result.group.films[row]].maps[target.asked]
    heat = np.asarray(Image.fromarray(np.asarray(raw / max(float(raw.max()), 1e-12), np.float32)).resize((_SHOWN_PX, _SHOWN_PX), 2))
    panel.set_axis_off()
    draw_film(panel, blend(image, heat, 0.55))
    truth = pose.moved_mask(square_target(film, target, _SHOWN_PX))
    panel.contour(truth.astype(float), levels=[0.5], colors=[_TRUTH], linewidths=1.6)
    box = box_of_map(raw, Box(0.0, 0.0, _SHOWN_PX, _SHOWN_PX), _SHOWN_PX, _SHOWN_PX)
    if box is not None:
        corner = (box.x0 - 0.5, box.y0 - 0.5)
        panel.add_patch(Rectangle(corner, box.x1 - box.x0, box.y1 - box.y0, fill=False, edgecolor=_BOX, linewidth=1.4))
