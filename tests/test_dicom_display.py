"""What the DICOM standard says of display, against cases worked out from its formulas: windows, tables, depths, syntaxes, geometry."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from dicom_files import dicom, film
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLSLossless, RLELossless

from ssacl.data.dicom import read_picture
from ssacl.data.refusals import RefusedImageError

DEEP = film().astype(np.uint16) << 4
"""12 bits."""


def shown(pixels: NDArray[Any], bits_stored: int = 0, **attributes: Any) -> NDArray[np.float64]:
    return read_picture(dicom(pixels, bits_stored, **attributes), correct_polarity=False).pixels.astype(float)


def lut(entries: list[int], first: int, bits: int, as_bytes: bool = False) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries), first, bits])
    if as_bytes:
        item.add_new("LUTData", "OW", np.array(entries, "<u2").tobytes())
    else:
        item.add_new("LUTData", "US", entries)
    return item


@pytest.mark.parametrize(("center", "width"), [(2048.0, 1024.0), (1000.5, 300.0), (2048.0, 4096.0)])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_window_functions(function: str, center: float, width: float) -> None:
    values = DEEP.astype(float)
    unit = {
        "LINEAR": (values - (center - 0.5)) / (width - 1) + 0.5,
        "LINEAR_EXACT": (values - center) / width + 0.5,
        "SIGMOID": 1 / (1 + np.exp(-4 * (values - center) / width)),
    }[function]
    pixels = shown(DEEP, 12, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    assert np.abs(pixels - np.clip(unit, 0, 1) * 255).max() <= 1


def test_a_falling_rescale_turns_the_window_around() -> None:
    pixels = shown(DEEP, 12, RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2048, WindowWidth=4096)
    unit = np.clip((4095 - DEEP.astype(float) - 2047.5) / 4095 + 0.5, 0, 1)
    assert np.abs(pixels - unit * 255).max() <= 1


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize(("first", "bits"), [(0, 12), (1000, 12), (500, 8), (0, 16)])
def test_voi_lut_sequence(first: int, bits: int, as_bytes: bool) -> None:
    length = 2000
    top = (1 << bits) - 1
    entries = [round(top * (index / (length - 1)) ** 2) for index in range(length)]
    pixels = shown(DEEP, 12, VOILUTSequence=[lut(entries, first, bits, as_bytes)])
    expected = np.array(entries)[np.clip(DEEP.astype(int) - first, 0, length - 1)] / top * 255
    assert np.abs(pixels - expected).max() <= 1


def test_a_voi_lut_over_negative_values() -> None:
    signed = film().astype(np.int16) * 8 - 1024
    pixels = shown(signed, 12, VOILUTSequence=[lut(list(range(0, 4096, 2)), -1024, 12)])
    assert np.abs(pixels - (signed.astype(int) + 1024) * 2 / 4095 * 255).max() <= 1


def test_a_modality_lut_comes_before_the_window() -> None:
    table = lut([4095 - value for value in range(4096)], 0, 12)
    table.ModalityLUTType = "US"
    pixels = shown(DEEP, 12, ModalityLUTSequence=[table], WindowCenter=2048, WindowWidth=4096)
    assert np.abs(pixels - (4095 - DEEP.astype(float)) / 4095 * 255).max() <= 1


def test_a_damaged_lut_is_as_none() -> None:
    damaged = lut([1, 2, 3], 0, 12)
    damaged.LUTDescriptor = [4000, 0, 12]
    pixels = shown(DEEP, 12, VOILUTSequence=[damaged])
    assert np.corrcoef(pixels.ravel(), film().ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("pixels", "bits_stored", "expected"),
    [
        (film() >> 2, 6, (film() >> 2) / 63 * 255),
        ((film().astype(np.int16) - 128).astype(np.int8), 8, film()),
        (film(), 8, film()),
    ],
)
def test_shallow_files_use_their_whole_depth(pixels: NDArray[Any], bits_stored: int, expected: NDArray[Any]) -> None:
    assert np.abs(shown(pixels, bits_stored) - expected).max() <= 1


def test_bits_above_and_below_the_values_do_not_count() -> None:
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    plain = shown(DEEP, 12, **window)
    # An overlay in the highest bit, as older CR readers store it.
    overlay = DEEP.copy()
    overlay[40:60] |= 0x8000
    assert np.array_equal(shown(overlay, 12, **window), plain)
    # Values that begin at bit 4 (high bit 15), with rubbish below.
    shifted = (DEEP << 4) | 0x000F
    assert np.array_equal(shown(shifted, 12, HighBit=15, **window), plain)
    # Signed 12 bits in 16: the sign stands at bit 11, and bits above it may be anything.
    signed = ((DEEP.astype(int) - 2048) & 0x0FFF).astype(np.int16)
    assert np.array_equal(shown(signed, 12, WindowCenter=0, WindowWidth=4096), plain)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("pixels", [film(), DEEP], ids=["8", "12"])
def test_lossless_syntaxes_show_the_same(syntax: str, pixels: NDArray[Any]) -> None:
    bits_stored = 8 if pixels.dtype == np.uint8 else 12
    window = {} if bits_stored == 8 else {"WindowCenter": 2048, "WindowWidth": 4096}
    assert np.array_equal(shown(pixels, bits_stored, syntax=syntax, **window), shown(pixels, bits_stored, **window))


def test_lossy_jpeg_and_big_endian() -> None:
    buffer = io.BytesIO()
    Image.fromarray(film()).save(buffer, "JPEG", quality=95)
    ds = dcmread(io.BytesIO(dicom(film())))
    ds.PixelData, ds.file_meta.TransferSyntaxUID = encapsulate([buffer.getvalue()]), JPEGBaseline8Bit
    ds["PixelData"].is_undefined_length = True
    saved = io.BytesIO()
    ds.save_as(saved)
    assert np.abs(read_picture(saved.getvalue()).pixels.astype(int) - film()).mean() < 2
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    ds = dcmread(io.BytesIO(dicom(DEEP, 12, **window)))
    ds.PixelData, ds.file_meta.TransferSyntaxUID = DEEP.byteswap().tobytes(), ExplicitVRBigEndian
    swapped = io.BytesIO()
    dcmwrite(swapped, ds, implicit_vr=False, little_endian=False, force_encoding=True)
    assert np.array_equal(read_picture(swapped.getvalue()).pixels, shown(DEEP, 12, **window))


def test_a_code_stream_of_another_size_than_the_header_is_refused() -> None:
    for syntax in (JPEGLSLossless, JPEG2000Lossless):
        ds = dcmread(io.BytesIO(dicom(film(), syntax=syntax)))
        ds.Rows = 120
        buffer = io.BytesIO()
        ds.save_as(buffer)
        with pytest.raises(RefusedImageError) as caught:
            read_picture(buffer.getvalue())
        assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(("value", "limit"), [(0, None), (4000, 4095), (4095, 4000)])
def test_padding_is_black_and_does_not_count(value: int, limit: int | None) -> None:
    framed = DEEP.copy() // 2 + 100
    inside = framed[20:].copy()
    framed[:20] = value
    attributes = {"PixelPaddingValue": value} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    pixels = shown(framed, 12, **attributes)
    assert (pixels[:20] == 0).all()
    # The same stretch as of the film without its frame.
    assert np.abs(pixels[20:] - shown(inside, 12)).max() <= 1


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ({"PixelAspectRatio": [2, 1]}, (256, 128)),
        ({"PixelAspectRatio": [3, 4]}, (128, 171)),
        ({"ImagerPixelSpacing": [0.2, 0.1]}, (256, 128)),
        ({"PixelSpacing": [0.1, 0.1], "PixelAspectRatio": [2, 1]}, (128, 128)),
        ({"PixelAspectRatio": [1, 1]}, (128, 128)),
        ({"PixelSpacing": [0.1000, 0.1005]}, (128, 128)),
    ],
)
def test_pixels_become_square(attributes: dict[str, Any], shape: tuple[int, int]) -> None:
    picture = read_picture(dicom(film(), **attributes))
    assert picture.pixels.shape == shape
    assert (picture.original_height_px, picture.original_width_px) == shape
    if "ImagerPixelSpacing" in attributes:
        assert picture.pixel_spacing_mm == (0.1, 0.1)
    back = np.asarray(Image.fromarray(picture.pixels).resize((128, 128), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(back - film()).mean() < 3


def test_pixels_that_cannot_be_are_refused() -> None:
    with pytest.raises(RefusedImageError) as caught:
        read_picture(dicom(film(), PixelAspectRatio=[1, 1000]))
    assert caught.value.reason == "unreadable"


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (["L", "F"], film()),
        (["R", "F"], film()[:, ::-1]),
        (["L", "H"], film()[::-1]),
        (["R", "H"], film()[::-1, ::-1]),
        (["F", "L"], film().T),
        (["H", "L"], film().T[:, ::-1]),
        (["F", "R"], film().T[::-1]),
        (["LF", "FR"], film()),
        (["L", "L"], film()),
        (["X", "F"], film()),
        ("L", film()),
    ],
)
def test_a_film_is_turned_upright(orientation: Any, stored: NDArray[Any]) -> None:
    picture = read_picture(dicom(np.ascontiguousarray(stored), PatientOrientation=orientation), correct_polarity=False)
    assert np.array_equal(picture.pixels, film())


def test_a_turned_film_has_its_spacing_turned() -> None:
    stored = np.ascontiguousarray(film()[:100].T)
    picture = read_picture(dicom(stored, PatientOrientation=["F", "L"], PixelSpacing=[0.1, 0.1005]), correct_polarity=False)
    assert picture.pixels.shape == (100, 128)
    assert picture.pixel_spacing_mm == (0.1005, 0.1)


def test_a_lateral_film_keeps_the_side_it_faces() -> None:
    for facing in ("A", "P"):
        picture = read_picture(dicom(film()[::-1].copy(), ViewPosition="LL", PatientOrientation=[facing, "H"]), keep_lateral=True)
        assert np.array_equal(picture.pixels, film())


@pytest.mark.parametrize("view", ["XTABLE LATERAL", "LAO", "RPO", "SWIMMERS"])
def test_oblique_and_cross_table_views_are_no_frontal_ones(view: str) -> None:
    with pytest.raises(RefusedImageError) as caught:
        read_picture(dicom(film(), ViewPosition=view))
    assert caught.value.reason == "lateral"
    assert read_picture(dicom(film(), ViewPosition=view), keep_lateral=True).view == view
    assert read_picture(dicom(film(), ViewPosition="AP AXIAL")).view == "AP AXIAL"
