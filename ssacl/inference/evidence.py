"""Pictures of the evidence: one map over the film, or a sheet with the film, the draft and every sentence's map.

The film is shown as it is stored: the patient's right is on the viewer's left. Every picture says that it is a draft.
"""

from __future__ import annotations

import io
import textwrap
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ssacl.anatomy import NODE_INDEX
from ssacl.errors import ConfigError
from ssacl.inference.film import BACKGROUND, BANNER, COLOURS, FAINT, INK, blend, draw_box, draw_film, printable, shown_film
from ssacl.inference.maps import map_on_picture
from ssacl.inference.report import Box, DraftReport

_STATUS_WORDS = {"present": "present", "absent": "absent", "uncertain": "uncertain", "unmentioned": "no finding named"}


def overlay_png(
    pixels: NDArray[Any], report: DraftReport, sentence_index: int | None = None, node: str | None = None, opacity: float = 0.6
) -> bytes:
    """The film with one evidence map over it, as PNG.

    Parameters
    ----------
    pixels
        [H, W] uint8 or uint16, the picture that `report` was made from.
    report
        Its draft.
    sentence_index
        Show this sentence's map and box.
    node
        Show this anatomy node's map. Without either: the mean map of the sentences that state something present, with their boxes.
    opacity
        Of the map where it is brightest, 0..1.

    Raises
    ------
    ConfigError
        The sentence or node does not exist, both are given, or the picture is not the report's.
    """
    _check_picture(pixels, report)
    grid_map, boxes, caption = _chosen(report, sentence_index, node)
    film = shown_film(pixels)
    scale = film.shape[1] / report.image_width_px
    image = Image.fromarray(blend(film, _heat(grid_map, report, film), opacity))
    draw = ImageDraw.Draw(image)
    size = max(11, round(0.032 * min(image.size)))
    for number, box in boxes:
        colour = COLOURS[number % len(COLOURS)]
        corners = (box.x0 * scale, box.y0 * scale, max(box.x0, box.x1 - 1) * scale, max(box.y0, box.y1 - 1) * scale)
        draw.rectangle(corners, outline=colour, width=max(2, size // 8))
        _label(draw, (corners[0] + 4, corners[1] + 2), str(number + 1), size, colour)
    _label(draw, (size * 0.5, size * 0.3), "R", round(size * 1.4), INK)
    _label(draw, (image.width - size * 0.5, size * 0.3), "L", round(size * 1.4), INK, anchor="ra")
    return _png(_with_footer(image, [BANNER, caption], size))


def evidence_sheet_png(pixels: NDArray[Any], report: DraftReport, max_sentences: int = 12) -> bytes:
    """The film, the draft's sentences and findings, and each sentence's map side by side, as PNG.

    Parameters
    ----------
    pixels
        [H, W] uint8 or uint16, the picture that `report` was made from.
    report
        Its draft.
    max_sentences
        Maps shown; the text lists every sentence.

    Raises
    ------
    ConfigError
        The picture is not the report's.
    """
    # Figure and canvas directly: pyplot keeps global state and is not safe in the endpoint's threads.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _check_picture(pixels, report)
    film = shown_film(pixels)
    shown = list(enumerate(report.sentences))[:max_sentences]
    columns = 4
    rows = -(-len(shown) // columns)
    aspect = min(1.35, film.shape[0] / film.shape[1])
    width, head, foot = 15.0, 0.6, 0.45
    film_height, row_height = 6.2 * aspect, 3.45 * aspect + 0.8
    wrapped = [textwrap.wrap(printable(sentence.text), 74) or [""] for sentence in report.sentences]
    listed = sorted(report.findings, key=lambda item: -_unit(item.probability))[:8]
    text_height = 0.5 + sum(0.24 * len(lines) + 0.27 for lines in wrapped) + 0.75 + 0.25 * len(listed)
    top_height = max(film_height, text_height)
    height = head + top_height + rows * row_height + foot
    figure = Figure(figsize=(width, height), dpi=90, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)

    def panel(x: float, y: float, w: float, h: float) -> Any:
        axes = figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))
        axes.set_axis_off()
        return axes

    def write(x: float, y: float, text: str, **style: Any) -> None:
        # parse_math off: a "$" in a report is a dollar sign.
        look: dict[str, Any] = {"color": INK, "fontsize": 11, "va": "top", "parse_math": False} | style
        figure.text(x / width, 1 - y / height, text, None, **look)

    write(0.3, 0.17, BANNER, fontsize=15, fontweight="bold", color="#ffd166")
    write(width - 0.3, 0.22, f"model {printable(report.model_version)[:40]}", ha="right", color=FAINT, fontsize=9)
    film_axes = panel(0.3, head, 6.2, film_height)
    draw_film(film_axes, film)
    for index, sentence in enumerate(report.sentences):
        if sentence.box is not None and sentence.status in ("present", "uncertain"):
            draw_box(film_axes, sentence.box, index, film.shape[1] / report.image_width_px, numbered=True)

    y = head + 0.05
    write(6.9, y, "Draft report", fontsize=13, fontweight="bold")
    y += 0.45
    for index, (sentence, lines) in enumerate(zip(report.sentences, wrapped, strict=True)):
        write(6.95, y, str(index + 1), color=COLOURS[index % len(COLOURS)], fontsize=13, fontweight="bold")
        write(7.35, y, "\n".join(lines), linespacing=1.35)
        y += 0.24 * len(lines)
        about = ", ".join(sentence.anatomy) or "whole chest"
        what = f"{sentence.finding} {_STATUS_WORDS.get(sentence.status, sentence.status)}" if sentence.finding else "no finding named"
        write(7.35, y, textwrap.shorten(f"{what} | {about} | token confidence {sentence.confidence:.2f}", 110), color=FAINT, fontsize=8.5)
        y += 0.27
    if not report.sentences:
        write(7.35, y, "The language model wrote no sentence.", color=FAINT)
        y += 0.3
    y += 0.2
    write(6.9, y, "Findings head", fontsize=12, fontweight="bold")
    y += 0.38
    for finding in listed:
        weight, ink = ("bold", INK) if finding.present else ("normal", FAINT)
        write(7.0, y, finding.name, fontweight=weight, color=ink, fontsize=10)
        bar = panel(9.9, y + 0.02, 2.6, 0.14)
        bar.set_xlim(0, 1)
        bar.set_ylim(0, 1)
        bar.barh(0.5, 1, 1, color="#263038")
        bar.barh(0.5, _unit(finding.probability), 1, color="#ff9f1c" if finding.present else "#5c6b78")
        bar.axvline(_unit(finding.threshold), color=INK, linewidth=1.2)
        write(12.65, y, f"{finding.probability:.2f}  (threshold {finding.threshold:.2f})", color=FAINT, fontsize=9)
        y += 0.25

    for place, (index, sentence) in enumerate(shown):
        x = 0.3 + (place % columns) * 3.65
        top = head + top_height + (place // columns) * row_height + 0.25
        colour = COLOURS[index % len(COLOURS)]
        title = textwrap.shorten(printable(sentence.text), 76, placeholder=" ...") or "(empty)"
        write(x, top, f"{index + 1}", color=colour, fontsize=12, fontweight="bold")
        write(x + 0.3, top + 0.02, "\n".join(textwrap.wrap(title, 44)[:2]), fontsize=8.5)
        axes = panel(x, top + 0.45, 3.45, 3.45 * aspect)
        draw_film(axes, blend(film, _heat(sentence.evidence, report, film), 0.6))
        if sentence.box is not None:
            draw_box(axes, sentence.box, index, film.shape[1] / report.image_width_px, numbered=False)
    write(0.3, height - foot + 0.12, printable(report.disclaimer), color=FAINT, fontsize=9)
    write(width - 0.3, height - foot + 0.12, "patient's right on the viewer's left", color=FAINT, fontsize=9, ha="right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=BACKGROUND, metadata={"Software": None})
    return buffer.getvalue()


def _chosen(report: DraftReport, sentence_index: int | None, node: str | None) -> tuple[NDArray[np.float32], list[tuple[int, Box]], str]:
    """The map to show, the numbered boxes over it, and a caption."""
    if sentence_index is not None and node is not None:
        raise ConfigError("Ask for a sentence or for an anatomy node, not for both.")
    if sentence_index is not None:
        if not 0 <= sentence_index < len(report.sentences):
            raise ConfigError(f"There is no sentence {sentence_index}: this draft has {len(report.sentences)}, numbered from 0.")
        sentence = report.sentences[sentence_index]
        return sentence.evidence, [(sentence_index, sentence.box)] if sentence.box else [], printable(sentence.text)
    if node is not None:
        if node not in NODE_INDEX:
            raise ConfigError(f"'{node}' is not an anatomy node; expected one of: {', '.join(NODE_INDEX)}.")
        return report.anatomy_maps[NODE_INDEX[node]], [], f"anatomy: {node}"
    stated = [(index, sentence) for index, sentence in enumerate(report.sentences) if sentence.status in ("present", "uncertain")]
    if not stated:
        return report.anatomy_maps[NODE_INDEX["chest"]], [], "no finding stated; anatomy: chest"
    mean = np.mean([sentence.evidence for _, sentence in stated], axis=0).astype(np.float32)
    boxes = [(index, sentence.box) for index, sentence in stated if sentence.box]
    return mean, boxes, "stated: " + ", ".join(sorted({sentence.finding or "other" for _, sentence in stated}))


def _check_picture(pixels: NDArray[Any], report: DraftReport) -> None:
    expected = (report.image_height_px, report.image_width_px)
    if pixels.shape != expected:
        raise ConfigError(
            f"The picture is {pixels.shape} (rows, columns), the report's is {expected}; pass the picture that it was made from."
        )


def _heat(grid_map: NDArray[np.float32], report: DraftReport, film: NDArray[np.uint8]) -> NDArray[np.float32]:
    height, width = film.shape[:2]
    return map_on_picture(grid_map, report.map_frame, report.image_width_px, report.image_height_px, width, height)


def _label(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str, anchor: str = "la") -> None:
    font = ImageFont.load_default(size=size)
    draw.text(at, text, fill=colour, font=font, anchor=anchor, stroke_width=max(1, size // 10), stroke_fill="black")


def _with_footer(image: Image.Image, lines: list[str], size: int) -> Image.Image:
    """The picture with text below it: nothing is written over the film but side marks and box numbers."""
    font = ImageFont.load_default(size=max(11, min(size, 20)))
    per_line = max(16, int(image.width / (font.getlength("n") or 1)))
    wrapped = [part for line in lines for part in (textwrap.wrap(line, per_line)[:3] or [""])]
    step = round(font.getbbox("Ag")[3] * 1.35)
    sheet = Image.new("RGB", (image.width, image.height + step * len(wrapped) + step // 2), BACKGROUND)
    sheet.paste(image, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(wrapped):
        draw.text((step * 0.4, image.height + step * (number + 0.2)), line, fill="#ffd166" if number == 0 else INK, font=font)
    return sheet


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _unit(value: float) -> float:
    return float(np.clip(np.nan_to_num(value), 0.0, 1.0))
