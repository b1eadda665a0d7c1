"""DICOM, PNG or JPEG bytes -> one grey frontal chest picture in display polarity, or a refusal with a named reason.

Nothing of a header but the fields of `Picture` leaves this module, and no header value enters a message.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ssacl.data.polarity import is_inverted
from ssacl.data.refusals import RefusedImageError
from ssacl.data.render import is_grey, render, stretch

if TYPE_CHECKING:
    from pydicom import Dataset

__all__ = ["Picture", "RefusedImageError", "encode_picture", "is_lateral", "known_view", "read_picture"]

MAX_BYTES = 200 << 20
MAX_PIXELS = 100_000_000
"""Rows x columns x samples. The largest radiography detectors make about 30 million."""
MIN_SIDE_PX = 32
_JPEG_QUALITY = 95

_RADIOGRAPHY = {"CR", "DX", "DR", "RG", "OT", "XR", ""}
_CHEST = re.compile(r"CHEST|THORAX|TORAX|LUNG|PULMO|RIB|HEART|STERN|CLAV")
_OTHER_PART = re.compile(
    r"ABD|BREAST|SKULL|HEAD|BRAIN|NECK|SPINE|PELVIS|HIP|FEMUR|KNEE|LEG|ANKLE|FOOT|TOE|SHOULDER|HUMER|ELBOW|ARM|WRIST|HAND|FINGER|JAW"
    r"|SINUS|TIBIA|EXTREM"
)
_LATERAL_VIEWS = {"LL", "RL", "LAT", "LATERAL", "LLAT", "RLAT", "LEFT LATERAL", "RIGHT LATERAL", "L", "R", "LLO", "RLO"}
_LATERAL_WORD = re.compile(r"\b(?:LAT|LATERAL|LL|RL)\b(?!\s+DECUB)")
_FRONTAL_WORD = re.compile(r"\b(?:PA|AP|FRONTAL|POSTERO-?ANTERIOR|ANTERO-?POSTERIOR)\b")
_ANIMAL_WORD = re.compile(r"\b(?:CANINE|FELINE|EQUINE|AVIAN|VETERINAR\w*)\b")
# SNOMED CT and SNOMED RT codes of PS3.16 CID 4010.
_VIEW_CODES = {
    "399348003": "PA",
    "R-10214": "PA",
    "399173006": "AP",
    "R-10206": "AP",
    "399067008": "LATERAL",
    "R-10236": "LL",
    "R-10232": "RL",
}
_VIEW_TERMS = re.compile(r"PA|AP|LL|RL|RLD|LLD|RLO|LLO|LAT|LLAT|RLAT|L|R|(?:LEFT |RIGHT )?LATERAL|AP SUPINE|PA ERECT|AP ERECT|FRONTAL")
_DESCRIPTIONS = ("SeriesDescription", "ProtocolName", "AcquisitionDeviceProcessingDescription", "PerformedProcedureStepDescription")


@dataclass(frozen=True)
class Picture:
    """One grey picture as it is to be seen: air dark, bone bright."""

    pixels: NDArray[np.uint8] | NDArray[np.uint16]
    """[H, W]; uint8, or uint16 (full range) where 16 bits were asked for and the file has more than 8."""
    view: str = ""
    """DICOM ViewPosition as far as known ("PA", "AP", "LL", "LATERAL", ...)."""
    original_width_px: int = 0
    original_height_px: int = 0
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


def read_picture(content: bytes, name: str = "", *, keep_lateral: bool = False, bits: int = 8, correct_polarity: bool = True) -> Picture:
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
            if content[128:132] == b"DICM" or content[:2] in {b"\x08\x00", b"\x02\x00"}:
                return _read_dicom(content, keep_lateral, bits, correct_polarity)
            if content.startswith((b"\x89PNG", b"\xff\xd8\xff")):
                return _read_file(content, bits)
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


def is_lateral(view: str) -> bool:
    """Whether a view position is a lateral one."""
    return view in _LATERAL_VIEWS or "LATERAL" in view


def known_view(text: str) -> str:
    """The view position that `text` names, upper-case; "" for free text, which might identify someone."""
    view = text.strip().upper()
    return view if _VIEW_TERMS.fullmatch(view) else ""


def _read_file(content: bytes, bits: int) -> Picture:
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
        _check_size(image.height, image.width)
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
    return _checked(Picture(pixels, pixel_digest=hashlib.sha256(content).hexdigest()))


def _read_dicom(content: bytes, keep_lateral: bool, bits: int, correct_polarity: bool) -> Picture:
    import pydicom

    _check_inflated_size(content)
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
    view = _check_subject(ds, keep_lateral)
    pixels, declared = render(ds, bits)
    picture = Picture(
        pixels,
        view=view,
        pixel_spacing_mm=_spacing(ds),
        pixel_digest=hashlib.sha256(ds.PixelData).hexdigest(),
        modality=_text(ds, "Modality"),
        laterality=laterality if (laterality := _text(ds, "ImageLaterality") or _text(ds, "Laterality")) in {"L", "R", "U", "B"} else "",
    )
    if declared and correct_polarity and not is_lateral(view) and is_inverted(pixels):
        picture = replace(picture, pixels=~pixels, polarity_corrected=True)
    return _checked(picture)


def _check_size(height: int, width: int, samples: int = 1) -> None:
    if height * width * samples > MAX_PIXELS:
        raise RefusedImageError("too_large")
    if min(height, width) < MIN_SIDE_PX:
        raise RefusedImageError("too_small")


def _check_inflated_size(content: bytes) -> None:
    """Refuse a deflated data set that would not fit in memory, before pydicom inflates it."""
    if b"1.2.840.10008.1.2.1.99" not in content[132:4096] or content[132:138] != b"\x02\x00\x00\x00UL":
        return
    start = 144 + int.from_bytes(content[140:144], "little")
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(content[start:], 2 * MAX_BYTES)
    if inflater.unconsumed_tail:
        raise RefusedImageError("too_large")


def _check_subject(ds: Dataset, keep_lateral: bool) -> str:
    """The view position, if this is one frontal radiograph of a human chest."""
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise RefusedImageError("multi_frame")
    if _text(ds, "Modality") not in _RADIOGRAPHY:
        raise RefusedImageError("not_radiography")
    descriptions = " | ".join(_text(ds, keyword) for keyword in _DESCRIPTIONS).replace("_", " ")
    view = _view(ds, descriptions)
    if is_lateral(view) and not keep_lateral:
        raise RefusedImageError("lateral")
    part = _text(ds, "BodyPartExamined")
    if _OTHER_PART.search(part) and not _CHEST.search(part):
        raise RefusedImageError("not_chest")
    if ("PatientSpeciesDescription" in ds and "HUMAN" not in _text(ds, "PatientSpeciesDescription")) or _ANIMAL_WORD.search(descriptions):
        raise RefusedImageError("not_human")
    return view


def _view(ds: Dataset, descriptions: str) -> str:
    view = _text(ds, "ViewPosition")
    if view:
        return known_view(view)
    for code in ds.get("ViewCodeSequence") or ():
        known = _VIEW_CODES.get(_text(code, "CodeValue"))
        if known:
            return known
    rows_run_to = str(_first(ds.get("PatientOrientation")) or "")[:1]
    if rows_run_to in {"A", "P"}:
        return "LATERAL"
    if _FRONTAL_WORD.search(descriptions):
        return ""
    return "LATERAL" if _LATERAL_WORD.search(descriptions) else ""


def _spacing(ds: Dataset) -> tuple[float, float] | None:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        try:
            between_rows, between_columns = (float(value) for value in ds.get(keyword) or ())
        except (TypeError, ValueError):
            continue
        if 0 < between_rows < 10 and 0 < between_columns < 10:
            return between_rows, between_columns
    return None


def _checked(picture: Picture) -> Picture:
    height, width = picture.pixels.shape
    if picture.pixels.min() == picture.pixels.max():
        raise RefusedImageError("blank")
    return replace(picture, original_width_px=width, original_height_px=height)


def _text(ds: Dataset, keyword: str) -> str:
    value = _first(ds.get(keyword))
    return str(value).strip().upper() if value is not None else ""


def _first(value: Any) -> Any:
    if value is None or isinstance(value, str | bytes):
        return value
    try:
        return next(iter(value), None)
    except TypeError:
        return value
