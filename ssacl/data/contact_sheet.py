"""A contact sheet: many samples of a data set on one picture, each with its view and what its labels say. To look at what was ingested."""

from __future__ import annotations

import io
import math

from PIL import Image, ImageDraw

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.data.records import SPLITS, Sample
from ssacl.data.shards import SampleEntry, ShardIndex, read_sample
from ssacl.data.storage import Storage
from ssacl.errors import DataError

TILE_PX = 200
_CAPTION_PX = 26
_MARKS = {FindingStatus.PRESENT: "", FindingStatus.UNCERTAIN: "?"}


def contact_sheet(storage: Storage, num_samples: int = 48, split: str = "train", num_columns: int = 8) -> bytes:
    """A PNG of samples spread evenly over a split, in its order.

    Raises
    ------
    DataError
        There is no data set, the split is empty or no split, or a sample is damaged.
    SplitError, StorageError
        As when it is read for training.
    """
    if split not in SPLITS:
        raise DataError(f"There is no split '{split}'; choose one of {', '.join(SPLITS)}.")
    entries = ShardIndex.load(storage).samples(split)
    if not entries:
        raise DataError(f"The split {split} of {storage.url} is empty. Choose another with --split.")
    chosen = _spread(entries, num_samples)
    num_columns = min(num_columns, len(chosen))
    height = TILE_PX + _CAPTION_PX
    sheet = Image.new("L", (num_columns * TILE_PX, math.ceil(len(chosen) / num_columns) * height))
    draw = ImageDraw.Draw(sheet)
    for number, entry in enumerate(chosen):
        sample = read_sample(storage, entry)
        left, top = number % num_columns * TILE_PX, number // num_columns * height
        with Image.open(io.BytesIO(sample.image), formats=("PNG", "JPEG")) as image:
            # Deep greys are halved by their bytes, not by Pillow, which would cut them off.
            tile = image.convert("I").point(lambda value: value / 256).convert("L") if image.mode.startswith("I") else image.convert("L")
        tile.thumbnail((TILE_PX - 4, TILE_PX - 4))
        sheet.paste(tile, (left + 2, top + 2))
        for line, text in enumerate(_caption(sample)):
            draw.text((left + 2, top + TILE_PX + 12 * line), text[: TILE_PX // 6], fill=255)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _spread(entries: list[SampleEntry], count: int) -> list[SampleEntry]:
    step = max(1.0, len(entries) / max(1, count))
    return [entries[int(number * step)] for number in range(min(max(1, count), len(entries)))]


def _caption(sample: Sample) -> tuple[str, str]:
    pairs = zip(FINDINGS, map(FindingStatus, sample.labels), strict=False)
    named = [f"{finding}{_MARKS[status]}" for finding, status in pairs if status in _MARKS]
    kind = "text" if sample.has_text else "labels" if sample.labels else "picture only"
    noted = ", text burned in" if sample.provenance.get("burned_in") else ""
    return f"{sample.view or 'view unknown'}, {kind}{noted}", ", ".join(named)
