"""Masks as run lengths, in the form of the SIIM-ACR pneumothorax challenge.

Pixels are counted down the columns, column after column. Runs are pairs of numbers: how many pixels to skip since the end of the last run,
and how many belong to the mask. "-1" is an empty mask.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ssacl.errors import DataError

EMPTY = "-1"


def decode(runs: str, width_px: int, height_px: int) -> NDArray[np.bool_]:
    """[height_px, width_px] the mask.

    Raises
    ------
    DataError
        It is no list of pairs, or reaches beyond the picture.
    """
    flat = np.zeros(width_px * height_px, dtype=bool)
    if runs.strip() != EMPTY:
        try:
            pairs = np.array([int(number) for number in runs.split()], dtype=np.int64).reshape(-1, 2)
        except ValueError as error:
            raise DataError("A run-length mask is no list of pairs of whole numbers, nor -1; copy the table again.") from error
        if (pairs < 0).any() or not len(pairs):
            raise DataError("A run-length mask has negative numbers, or none at all; an empty mask is written -1.")
        ends = np.cumsum(pairs.sum(1))
        if ends[-1] > len(flat):
            raise DataError(f"A run-length mask reaches beyond its picture of {width_px} x {height_px} px; it belongs to another size.")
        for end, length in zip(ends.tolist(), pairs[:, 1].tolist(), strict=True):
            flat[end - length : end] = True
    return flat.reshape(width_px, height_px).T


def encode(mask: NDArray[np.bool_]) -> str:
    """The run lengths of [H, W]."""
    flat = np.concatenate([[False], mask.T.ravel(), [False]]).astype(np.int8)
    starts, ends = np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)
    if not len(starts):
        return EMPTY
    skips = starts - np.concatenate([[0], ends[:-1]])
    return " ".join(f"{skip} {length}" for skip, length in zip(skips.tolist(), (ends - starts).tolist(), strict=True))
