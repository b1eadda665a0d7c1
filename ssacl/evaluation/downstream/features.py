"""Frozen features and raw pixels of films, made once and kept part by part, so that an interrupted run goes on.

Shape letters: b films of a part, n films, D vision width.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ssacl.data.transforms import MEAN, STD, Square, normalise
from ssacl.evaluation.downstream.films import FilmReader, TaskFilm
from ssacl.inference.files import write_whole
from ssacl.models.ssacl import SSACL

logger = logging.getLogger(__name__)

PART = 64
"""Films encoded together: what an interruption costs."""
RAW_PX = 32
"""Side of the film that the raw-pixel baseline reads."""


class FilmEncoder(nn.Module):
    """The checkpoint's encoder, to frozen or trained features of whole films.

    The graph's queries take part in the `official` wiring alone: there the class token depends on them.
    """

    queries: Tensor | None

    def __init__(self, model: SSACL) -> None:
        super().__init__()
        self.encoder = model.encoder
        with torch.no_grad():
            self.register_buffer("queries", model.node_queries().detach() if model.official else None, persistent=False)
        self.width = 2 * model.config.vision.width

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S] normalised -> [B, 2 D]: mean patch and class token, as the findings stage pools them."""
        latent = self.encoder(image_BCHW, self.queries)
        return torch.cat([latent.patches_BVD.mean(1), latent.cls_BD], -1)


@dataclass(frozen=True)
class Features:
    """Of n films, in their order."""

    encoded: NDArray[np.float32]
    """[n, 2 D]."""
    raw: NDArray[np.float32]
    """[n, RAW_PX ** 2] grey, 0..1."""


def to_images(squares: NDArray[np.float32], device: torch.device | str = "cpu") -> Tensor:
    """[b, S, S] squares -> [b, 3, S, S] normalised."""
    return torch.from_numpy(np.stack([normalise(square) for square in squares])).to(device)


def frozen_features(
    model: SSACL,
    model_version: str,
    reader: FilmReader,
    films: Sequence[TaskFilm],
    kept_in: Path,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Features of films, those that `kept_in` has already not made again.

    Parameters
    ----------
    progress
        Called with the number of films done since the last call.

    Raises
    ------
    DataError, StorageError
        A film cannot be read, or the disk refuses.
    """
    size, parts = model.config.vision.image_size_px, []
    device = model.tau.device
    encoder = FilmEncoder(model).eval()
    for start in range(0, len(films), PART):
        own = films[start : start + PART]
        path = kept_in / f"{_name(model_version, own)}.npz"
        part = _kept(path, len(own))
        if part is None:
            squares = np.concatenate(list(reader.batches(own, size, PART)))
            with torch.inference_mode():
                encoded = encoder(to_images(squares, device)).float().cpu().numpy()
            part = Features(encoded, np.stack([raw_pixels(square) for square in squares]))
            content = io.BytesIO()
            np.savez(content, encoded=part.encoded, raw=part.raw)
            write_whole(path, content.getvalue())
        parts.append(part)
        if progress is not None:
            progress(len(own))
    return Features(np.concatenate([part.encoded for part in parts]), np.concatenate([part.raw for part in parts]))


def raw_pixels(square: Square) -> NDArray[np.float32]:
    """[RAW_PX ** 2] the square, scaled down by the mean of its areas."""
    pooled = nn.functional.interpolate(torch.from_numpy(square)[None, None], size=(RAW_PX, RAW_PX), mode="area")
    flat: NDArray[np.float32] = pooled.flatten().numpy()
    return flat


def _name(model_version: str, films: Sequence[TaskFilm]) -> str:
    """A file name that changes with what the features depend on."""
    ids = "\n".join(film.id for film in films)
    return hashlib.sha256(f"{model_version}|{RAW_PX}|{MEAN}|{STD}|{ids}".encode()).hexdigest()[:32]


def _kept(path: Path, count: int) -> Features | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            kept = Features(stored["encoded"], stored["raw"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        logger.warning("%s is damaged and is made again", path.name)
        return None
    return kept if len(kept.encoded) == len(kept.raw) == count else None
