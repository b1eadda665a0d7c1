"""A picture of answers to phrases: the film once for each, with its map, its box and how sure the model is."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from ssacl.errors import ConfigError
from ssacl.inference.film import BACKGROUND, BANNER, FAINT, INK, blend, draw_box, draw_film, printable, shown_film
from ssacl.inference.maps import map_on_picture
from ssacl.inference.report import PhraseEvidence

_COLUMNS = 3


def phrase_sheet_png(pixels: NDArray[Any], answers: Sequence[PhraseEvidence]) -> bytes:
    """One panel per answer, as PNG.

    Parameters
    ----------
    pixels
        [H, W] uint8 or uint16, the picture that was asked.
    answers
        What `ReportGenerator.ground` said of it.

    Raises
    ------
    ConfigError
        There is no answer to draw.
    """
    # Figure and canvas directly: pyplot keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not answers:
        raise ConfigError("A sheet needs at least one phrase.")
    film = shown_film(pixels)
    height_px, width_px = pixels.shape
    columns = min(_COLUMNS, len(answers))
    rows = -(-len(answers) // columns)
    aspect = min(1.35, film.shape[0] / film.shape[1])
    figure = Figure(figsize=(4.6 * columns, (4.4 * aspect + 1.0) * rows + 0.6), dpi=90, facecolor=BACKGROUND, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(BANNER, color="#ffd166", fontsize=12, fontweight="bold")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for number, axes in enumerate(panels):
        axes.set_axis_off()
        if number >= len(answers):
            continue
        answer = answers[number]
        heat = map_on_picture(answer.evidence, answer.map_frame, width_px, height_px, film.shape[1], film.shape[0])
        # A map of what is not there is shown faintly, and without a box.
        draw_film(axes, blend(film, heat, 0.25 if answer.names_nothing else 0.6))
        if answer.box is not None and not answer.names_nothing:
            draw_box(axes, answer.box, number, film.shape[1] / width_px, numbered=False)
        note = answer.reason or f"confidence {answer.confidence:.2f}"
        words = textwrap.wrap(printable(answer.phrase), 48)[:2] + textwrap.wrap(note, 60)[:2]
        axes.set_title("\n".join(words), color=FAINT if answer.names_nothing else INK, fontsize=9, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=BACKGROUND, metadata={"Software": None})
    return buffer.getvalue()
