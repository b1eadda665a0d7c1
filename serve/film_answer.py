"""The film as the reader page shows it, inside the JSON answer: one request, and nothing is stored between two."""

from __future__ import annotations

import base64
import io

from PIL import Image

from serve.schemas import FilmModel
from ssacl.data.dicom import Picture
from ssacl.inference.film import shown_film

LONGEST_SIDE_PX = 2048
_COMPRESSION = 3
"""Of zlib. Higher levels take a second for a detector's film and save a tenth."""


def film_answer(picture: Picture) -> FilmModel:
    """The picture, made smaller where it is larger than a screen shows."""
    image = Image.fromarray(shown_film(picture.pixels, LONGEST_SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=_COMPRESSION)
    return FilmModel(png_base64=base64.b64encode(buffer.getvalue()).decode(), width_px=image.width, height_px=image.height)
