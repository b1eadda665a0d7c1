"""DICOM, PNG or JPEG bytes -> one grey frontal chest picture in display polarity, or a refusal with a named reason.

Nothing of a header but the fields of `Picture` leaves this module, and no header value enters a message.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssacl.data.burned_in import Box, blanked, text_boxes
from ssacl.data.dicom_guard import MAX_INFLATED_BYTES, codestream_size, has_too_many_scans, inflates_beyond, is_dicom
from ssacl.data.geometry import is_turned, pixel_aspect, pixel_spacing, squared, upright
from ssacl.data.polarity import is_inverted
from ssacl.data.quiet import quiet_loggers
from ssacl.data.refusals import RefusedImageError
from ssacl.data.render import is_grey, render, stretch
from ssacl.data.subject import check_subject, is_lateral, known_view, text_value

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["Picture", "RefusedImageError", "encode_picture", "is_lateral", "known_view", "read_picture"]

MAX_BYTES = 200 << 20
MAX_PIXELS = 100_000_000
"""Rows x columns x samples. The largest radiography detectors make about 30 million."""
MIN_SIDE_PX = 32
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class Picture:
    """One grey picture as it is to be seen: air dark, bone bright."""

    pixels: NDArray[np.uint8] | NDArray[np.uint16]
    """[H, W]; uint8, or uint16 (full range) where 16 bits were asked for and the file has more than 8."""
    view: str = ""
    """DICOM ViewPosition as far as known ("PA", "AP", "LL", "LATERAL", ...)."""
    original_width_px: int = 0
    original_height_px: int = 0
    """Of `pixels` above: after non-square pixels were made square and the film was turned upright."""
    pixel_spacing_mm: tuple[float, float] | None = None
    """Between rows, between columns; of the detector where there is no calibrated one."""
    pixel_digest: str = ""
    """sha256 of the stored PixelData bytes (DICOM) or of the file (PNG, JPEG)."""
    modality: str = ""
    """One of CR, DX, DR, RG, OT; empty if not DICOM."""
    laterality: str = ""
    """DICOM ImageLaterality, "L", "R", "U" or "B"; empty for most."""
    polarity_corrected: bool = False
    """The header's polarity was contradicted by the film, and the film was believed."""
    burned_in: str = ""
    """"declared" by the header (BurnedInAnnotation), else "suspected" by `ssacl.data.burned_in`; empty: neither."""
    text_boxes: tuple[Box, ...] = ()
    """Where lines of burned-in text were found, in pixels; blanked if that was asked for."""


def read_picture(
    content: bytes,
    name: str = "",
    *,
    keep_lateral: bool = False,
    bits: int = 8,
    correct_polarity: bool = True,
    blank_text: bool = False,
    find_text: bool = False,
) -> Picture:
    """Read a DICOM, PNG or JPEG file as a frontal chest picture at its original size. What it is, its first bytes tell.

    Parameters
    ----------
    content
        The file's bytes.
    name
        File name; only its suffix is used, to say what the file claims to be.
    keep_lateral
        Accept lateral views.
    bits
        8, or 16 to keep the depth of deeper files.
    correct_polarity
        Check the declared polarity of DICOM films against the film (`ssacl.data.polarity`).
    blank_text
        Fill what looks like burned-in text; looks for it.
    find_text
        Look for burned-in text.

    Raises
    ------
    RefusedImageError
        (an ImageError) with `.reason`, one of `ssacl.data.refusals.REASONS`.
    """
    if not content:
        raise RefusedImageError("empty")
    if len(content) > MAX_BYTES:
        raise RefusedImageError("too_large")
    try:
        with warnings.catch_warnings():
            # pydicom and Pillow quote header values in their warnings.
            warnings.simplefilter("ignore")
            quiet_loggers("pydicom", "PIL")
            picture = None
            if is_dicom(content):
                picture = _read_dicom(content, keep_lateral, bits, correct_polarity)
            elif content.startswith((b"\x89PNG", b"\xff\xd8\xff")):
                picture = _read_file(content, bits)
            if picture:
                return _looked_over(picture, blank_text, find_text)
    except RefusedImageError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise RefusedImageError("too_large") from error
    # Decoders raise whatever they like on damaged files; their texts may quote the header, so only the reason is passed on.
    except Exception:
        raise RefusedImageError("unreadable") from None
    claims_dicom = name.lower().endswith((".dcm", ".dicom", ".dic"))
    raise RefusedImageError("not_dicom" if claims_dicom else "not_a_picture")


def encode_picture(picture: Picture, longest_side_px: int = 512) -> tuple[bytes, str]:
    """The picture scaled down to `longest_side_px` (never up), as 8-bit JPEG, or as PNG where it has 16 bits.

    Returns
    -------
    content
        Encoded bytes.
    image_format
        "jpg" or "png".
    """
    height, width = picture.pixels.shape
    scale = min(1.0, longest_side_px / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = io.BytesIO()
    if picture.pixels.dtype == np.uint8:
        image = Image.fromarray(picture.pixels)
        if scale < 1:
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        return buffer.getvalue(), "jpg"
    deep = Image.fromarray(picture.pixels.astype(np.float32))
    if scale < 1:
        deep = deep.resize(size, Image.Resampling.LANCZOS)
    Image.fromarray(np.clip(np.rint(np.asarray(deep)), 0, 65535).astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue(), "png"


def _read_file(content: bytes, bits: int) -> Picture:
    if has_too_many_scans(content):
        raise RefusedImageError("unreadable")
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
        _check_size(image.height, image.width, len(image.getbands()))
        if getattr(image, "n_frames", 1) > 1:
            raise RefusedImageError("multi_frame")
        image.load()
        if image.mode in {"I;16", "I;16B", "I"}:
            pixels = stretch(np.asarray(image, dtype=np.int64), bits)
        else:
            if "A" in image.mode or "transparency" in image.info:
                layer = image.convert("RGBA")
                image_rgb = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), layer).convert("RGB")
            else:
                image_rgb = image.convert("RGB") if image.mode not in {"L", "1"} else image.convert("L")
            values = np.asarray(image_rgb)
            if values.ndim == 3:
                if not is_grey(values):
                    raise RefusedImageError("colour")
                values = np.asarray(image_rgb.convert("L"))
            pixels = values.astype(np.uint8)
    return Picture(pixels, pixel_digest=hashlib.sha256(content).hexdigest())


def _read_dicom(content: bytes, keep_lateral: bool, bits: int, correct_polarity: bool) -> Picture:
    import pydicom

    if inflates_beyond(content, MAX_INFLATED_BYTES):
        raise RefusedImageError("too_large")
    # The size is read before the pixels: a header may promise more than the memory holds.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    ds = pydicom.dcmread(io.BytesIO(content), force=content[128:132] != b"DICM")
    if "TransferSyntaxUID" not in ds.file_meta:
        # A bare data set, as older archives write them: the syntax is what pydicom found by looking.
        is_implicit = ds.original_encoding[0]
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian if is_implicit else pydicom.uid.ExplicitVRLittleEndian
    # pydicom drops what the file breaks off in, up to the whole data set: the tag of the pixels is there, its value is not.
    nothing = "unreadable" if b"\xe0\x7f\x10\x00" in content else "no_pixels"
    if "Rows" not in ds or "Columns" not in ds:
        raise RefusedImageError(nothing)
    samples = int(ds.get("SamplesPerPixel") or 1)
    _check_size(int(ds.Rows), int(ds.Columns), samples)
    if "PixelData" not in ds or not ds.PixelData:
        raise RefusedImageError(nothing)
    view = check_subject(ds, keep_lateral)
    _check_frame(ds, samples)
    lateral, aspect, spacing = is_lateral(view), pixel_aspect(ds), pixel_spacing(ds)
    pixels, declared = render(ds, bits)
    square = squared(pixels, aspect, MAX_PIXELS)
    if spacing and square.shape != pixels.shape:
        spacing = (min(spacing), min(spacing))
    pixels = upright(square, ds, lateral=lateral)
    picture = Picture(
        pixels,
        view=view,
        pixel_spacing_mm=spacing[::-1] if spacing and is_turned(ds) else spacing,
        pixel_digest=hashlib.sha256(ds.PixelData).hexdigest(),
        modality=text_value(ds, "Modality"),
        laterality=laterality
        if (laterality := text_value(ds, "ImageLaterality") or text_value(ds, "Laterality")) in {"L", "R", "U", "B"}
        else "",
        burned_in="declared" if text_value(ds, "BurnedInAnnotation") == "YES" else "",
    )
    if declared and correct_polarity and not lateral and is_inverted(pixels):
        picture = replace(picture, pixels=~pixels, polarity_corrected=True)
    return picture


def _looked_over(picture: Picture, blank_text: bool, find_text: bool) -> Picture:
    height, width = picture.pixels.shape
    if picture.pixels.min() == picture.pixels.max():
        raise RefusedImageError("blank")
    picture = replace(picture, original_width_px=width, original_height_px=height)
    boxes = text_boxes(picture.pixels) if find_text or blank_text else []
    if not boxes:
        return picture
    pixels = blanked(picture.pixels, boxes) if blank_text else picture.pixels
    return replace(picture, pixels=pixels, burned_in=picture.burned_in or "suspected", text_boxes=tuple(boxes))


def _check_size(height: int, width: int, samples: int = 1) -> None:
    if height * width * samples > MAX_PIXELS:
        raise RefusedImageError("too_large")
    if min(height, width) < MIN_SIDE_PX:
        raise RefusedImageError("too_small")


def _check_frame(ds: Dataset, samples: int) -> None:
    """Refuse what a decoder would make more of than the header says, before it does."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    if int(ds.get("BitsAllocated") or 0) > 16:
        raise RefusedImageError("unreadable")
    syntax = ds.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    frame = get_frame(ds.PixelData, 0, number_of_frames=1)
    size = codestream_size(frame)
    num_bytes = int(ds.Rows) * int(ds.Columns) * samples * -(-int(ds.BitsAllocated) // 8)
    # Run lengths cost two bytes for one in the worst case; more is no picture, and decoding it has no end.
    oversized = syntax == RLELossless and len(frame) > 2 * num_bytes + 64
    if oversized or has_too_many_scans(frame) or (size is not None and size != (ds.Rows, ds.Columns)):
        raise RefusedImageError("unreadable")
