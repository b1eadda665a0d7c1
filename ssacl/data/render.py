"""Stored DICOM values -> display greys: modality transform, window or VOI LUT, polarity (PS3.3 C.7.6.3, C.11.1, C.11.2; PS3.4 N.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ssacl.data.refusals import RefusedImageError

if TYPE_CHECKING:
    from pydicom import Dataset

Grey = NDArray[np.uint8] | NDArray[np.uint16]
_CLIPPED_PERCENT = 0.5
_MIN_LEVELS = 16
_BLOCK_PX = 1 << 20
_GREY_TOLERANCE = 3.0


def render(ds: Dataset, bits: int) -> tuple[Grey, bool]:
    """The pixels [H, W] as they are to be seen, and whether the header declared their polarity (false for colour files).

    All steps act on single values, so they are computed once per possible value and looked up. Without a window, deep files are
    stretched between their 0.5th and 99.5th percentiles and 8-bit files stay as they are.

    Raises
    ------
    RefusedImageError
        Colour that is not grey.
    """
    stored = stored_values(ds)
    if stored.ndim == 3 and stored.shape[-1] == 3:
        if not is_grey(stored):
            raise RefusedImageError("colour")
        return stretch(stored[..., 1].astype(np.int64), bits) if stored.dtype != np.uint8 else np.ascontiguousarray(stored[..., 1]), False
    if stored.ndim != 2 or not str(ds.get("PhotometricInterpretation", "")).startswith("MONOCHROME"):
        raise RefusedImageError("colour")
    first = int(stored.min())
    # More than 16 bits would make the table large; radiographs have at most 16.
    if stored.dtype.kind not in "iu" or int(stored.max()) - first >= 1 << 16:
        raise RefusedImageError("unreadable")
    used = np.arange(first, int(stored.max()) + 1)
    table = _display_table(ds, stored, used, bits)
    # The standard ties INVERSE to MONOCHROME1 in DX; files that carry both mean one inversion.
    if ds.PhotometricInterpretation == "MONOCHROME1" or ds.get("PresentationLUTShape") == "INVERSE":
        table = ~table
    table[_padding(ds, used)] = 0
    shown: Grey = np.empty(stored.shape, table.dtype)
    for rows in _blocks(stored):
        # An index takes 8 bytes a pixel: a block at a time.
        shown[rows] = table[stored[rows].astype(np.int64) - first]
    return shown, True


def stored_values(ds: Dataset) -> NDArray[Any]:
    """The stored values [H, W] or [H, W, 3], without what else lies in their words (PS3.5 section 8.1.1)."""
    from pydicom.pixels import pixel_array

    high_bit, bits_stored = int(ds.get("HighBit", -1)), int(ds.BitsStored)
    shift = high_bit + 1 - bits_stored
    if shift <= 0 or ds.file_meta.TransferSyntaxUID.is_encapsulated or high_bit >= int(ds.BitsAllocated):
        stored: NDArray[Any] = pixel_array(ds)
        return stored
    # pydicom takes the values to begin at bit 0. Read with the bits below them, they are shifted down.
    ds.BitsStored = high_bit + 1
    stored = pixel_array(ds) >> shift
    ds.BitsStored = bits_stored
    return stored


def _blocks(values: NDArray[Any]) -> Iterator[slice]:
    rows = max(1, _BLOCK_PX // max(1, values.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(values), rows))


def stretch(values: NDArray[np.int64], bits: int) -> Grey:
    """`values` [H, W] over the full range of `bits`, clipped at the 0.5th and 99.5th percentile."""
    low, high = np.percentile(values, [_CLIPPED_PERCENT, 100 - _CLIPPED_PERCENT])
    return _scaled(values.astype(np.float64), float(low), float(high), bits)


def is_grey(values: NDArray[Any]) -> bool:
    """Whether three channels [H, W, 3] hold one grey picture; a few coloured pixels (a marker) do not count."""
    spread = values.max(axis=2).astype(np.float64) - values.min(axis=2)
    return float(spread.mean()) <= _GREY_TOLERANCE * (1 if values.dtype == np.uint8 else 257)


def _display_table(ds: Dataset, stored: NDArray[Any], used: NDArray[np.int64], bits: int) -> Grey:
    modal = _modal(ds, used)
    if ds.get("VOILUTSequence") or ("WindowCenter" in ds and "WindowWidth" in ds):
        try:
            windowed = _windowed(ds, modal)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, NotImplementedError):
            # A window or table that the standard forbids; pydicom has no error of its own for it: ValueError (width 0, unknown function, a
            # descriptor of two numbers), IndexError (an empty sequence), KeyError and AttributeError (an element is missing), TypeError
            # (no value), NotImplementedError (an unknown VR). The film is then shown as if there were no window.
            windowed = None
        table = None if windowed is None else _scaled(*windowed, bits)
        # A window beside the values makes a picture of one or two greys: do not believe it.
        if table is not None and len(np.unique(table)) >= min(_MIN_LEVELS, len(used)):
            return table
    if stored.dtype.itemsize == 1 and bool((modal == used).all()):
        levels = 1 << min(8, int(ds.BitsStored))
        return _scaled(modal, 0, levels - 1, bits) if stored.dtype.kind == "u" else _scaled(modal, -levels / 2, levels / 2 - 1, bits)
    counts = np.zeros(len(used), dtype=np.int64)
    for rows in _blocks(stored):
        counts += np.bincount((stored[rows].astype(np.int64) - used[0]).ravel(), minlength=len(used))
    counts[_padding(ds, used)] = 0
    order = np.argsort(modal, kind="stable")
    share = np.cumsum(counts[order]) / max(counts.sum(), 1)
    low, high = np.searchsorted(share, [_CLIPPED_PERCENT / 100, 1 - _CLIPPED_PERCENT / 100])
    return _scaled(modal, float(modal[order[low]]), float(modal[order[min(high, len(order) - 1)]]), bits)


def _windowed(ds: Dataset, modal: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, float]:
    """Values after the VOI LUT, else the first window, and what is black and white in them."""
    from pydicom.pixels import apply_windowing

    if ds.get("VOILUTSequence"):
        shown, top = _looked_up(ds, ds.VOILUTSequence[0], modal)
        return shown, 0.0, top
    # The ends of the output range depend on bits, sign and slope: two values far outside of the window show them.
    shown = np.asarray(apply_windowing(np.append(modal, [-1e9, 1e9]), ds))
    return shown[:-2], float(shown[-2]), float(shown[-1])


def _modal(ds: Dataset, used: NDArray[np.int64]) -> NDArray[np.float64]:
    """Stored values after the modality LUT or rescale (PS3.3 C.11.1)."""
    if ds.get("ModalityLUTSequence"):
        return _looked_up(ds, ds.ModalityLUTSequence[0], used.astype(np.float64))[0]
    slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
    modal = used.astype(np.float64)
    return modal if slope is None or intercept is None else modal * float(slope) + float(intercept)


def _looked_up(ds: Dataset, item: Dataset, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """`values` after a LUT, and its largest output (PS3.3 C.11.1.1.1, C.11.2.1.1).

    pydicom's own stops at modality LUTs of other depths than 8 and 16, and wraps around where VOI LUTs have fewer bits than pixels.
    """
    length, first, bits_per_entry = (int(value) for value in item.LUTDescriptor)
    length = length or 1 << 16
    # The descriptor's VR may say unsigned of a signed value.
    first -= (1 << 16) if first >= 1 << 15 and values.min() < 0 else 0
    data = item.LUTData
    if isinstance(data, bytes):
        little = ds.file_meta.TransferSyntaxUID.is_little_endian
        kind = "u1" if len(data) < 2 * length else ("<u2" if little else ">u2")
        entries = np.frombuffer(data, kind, count=length)
    else:
        entries = np.asarray(data)[:length]
    if len(entries) != length or not 8 <= bits_per_entry <= 16:
        raise ValueError
    index = np.clip(np.floor(values) - first, 0, length - 1).astype(np.int64)
    return entries[index].astype(np.float64), float((1 << bits_per_entry) - 1)


def _padding(ds: Dataset, used: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the values in use are padding, PS3.3 C.7.5.1.1.2; all False where padding is not declared."""
    value = ds.get("PixelPaddingValue")
    if not isinstance(value, int):
        return np.zeros(len(used), dtype=bool)
    limit = ds.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    return (used >= low) & (used <= high)


def _scaled(values: NDArray[np.float64], low: float, high: float, bits: int) -> Grey:
    """From 0 at `low` to all of `bits` at `high`, which lies below `low` where the modality transform falls."""
    top, span = (1 << bits) - 1, high - low
    unit = np.clip((values - low) / (span if abs(span) > 1e-9 else 1e-9), 0, 1) * top
    return np.rint(unit).astype(np.uint8) if bits == 8 else np.rint(unit).astype(np.uint16)
