"""Pictures: what a file shows comes out as it is to be seen, or is refused by name before it can do harm."""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import dicom, film
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from ssacl.data.dicom import encode_picture, read_picture
from ssacl.data.polarity import INVERTED_BELOW, is_inverted, polarity_score
from ssacl.data.refusals import REASONS, RefusedImageError
from ssacl.errors import ImageError
from ssacl.phantom import generate_study

REAL = Path(__file__).parents[2] / "shared" / "data" / "real"


def image_file(pixels: NDArray[Any], kind: str = "PNG", mode: str | None = None) -> bytes:
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def test_eight_bit_monochrome2_comes_out_as_stored() -> None:
    content = dicom(film(), PixelSpacing=[0.2, 0.2], ImageLaterality="U")
    picture = read_picture(content, "x.dcm")
    assert np.array_equal(picture.pixels, film())
    assert picture.pixels.dtype == np.uint8
    assert (picture.view, picture.modality, picture.laterality) == ("PA", "DX", "U")
    assert picture.pixel_spacing_mm == (0.2, 0.2)
    assert (picture.original_width_px, picture.original_height_px) == (128, 128)
    assert picture.pixel_digest == hashlib.sha256(film().tobytes()).hexdigest()
    assert not picture.polarity_corrected


@pytest.mark.parametrize("attributes", [{}, {"PresentationLUTShape": "INVERSE"}])
def test_monochrome1_is_inverted_once(attributes: dict[str, str]) -> None:
    picture = read_picture(dicom(~film(), PhotometricInterpretation="MONOCHROME1", **attributes))
    assert np.array_equal(picture.pixels, film())
    assert not picture.polarity_corrected


def test_a_film_mislabelled_either_way_is_believed_over_its_header() -> None:
    relabelled = read_picture(dicom(film(), PhotometricInterpretation="MONOCHROME1"))
    assert relabelled.polarity_corrected
    assert np.array_equal(relabelled.pixels, film())
    unlabelled = read_picture(dicom(~film()))
    assert unlabelled.polarity_corrected
    assert np.array_equal(unlabelled.pixels, film())
    as_declared = read_picture(dicom(~film()), correct_polarity=False)
    assert np.array_equal(as_declared.pixels, ~film())


def test_rescale_and_window() -> None:
    stored = film().astype(np.uint16) << 4  # 12 bits
    shown = read_picture(dicom(stored, 12, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=2 * 2048 - 100, WindowWidth=4096)).pixels
    modal = stored.astype(float) * 2 - 100
    expected = np.clip((modal - (2 * 2048 - 100) + 0.5) / 4095 + 0.5, 0, 1) * 255  # PS3.3 C.11.2.1.2
    assert np.abs(shown - expected).max() <= 1
    # Outside of the window everything is black or white.
    assert shown.min() == 0
    assert shown.max() == 255


@pytest.mark.parametrize("window", [(60000.0, 10.0), (100.0, 0.0), (None, None)])
def test_without_a_usable_window_the_film_is_stretched(window: tuple[float | None, float | None]) -> None:
    stored = film().astype(np.uint16) * 3 + 500
    attributes = {} if window[0] is None else {"WindowCenter": window[0], "WindowWidth": window[1]}
    shown = read_picture(dicom(stored, 12, **attributes)).pixels
    assert shown.min() == 0
    assert shown.max() == 255
    assert np.corrcoef(shown.ravel(), film().ravel())[0, 1] > 0.99


def test_signed_values_voi_lut_and_padding() -> None:
    signed = film().astype(np.int16) - 128
    assert np.corrcoef(read_picture(dicom(signed, 16)).pixels.ravel(), film().ravel())[0, 1] > 0.99
    lut = Dataset()
    lut.LUTDescriptor = [256, 0, 8]
    lut["LUTDescriptor"].VR = "US"
    lut.LUTData = [min(255, 2 * value) for value in range(256)]
    lut["LUTData"].VR = "US"
    shown = read_picture(dicom(film(), VOILUTSequence=[lut])).pixels
    assert np.abs(shown.astype(int) - np.minimum(255, 2 * film().astype(int))).max() <= 3
    padded = film().copy()
    padded[:10] = 0
    shown = read_picture(dicom(~padded, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=255)).pixels
    assert (shown[:10] == 0).all()


def test_sixteen_bits_where_asked() -> None:
    stored = film().astype(np.uint16) << 8
    picture = read_picture(dicom(stored, 16, WindowCenter=32768, WindowWidth=65536), bits=16)
    assert picture.pixels.dtype == np.uint16
    assert np.abs(picture.pixels.astype(int) - stored).max() <= 300
    content, kind = encode_picture(picture, 64)
    assert kind == "png"
    assert np.asarray(Image.open(io.BytesIO(content))).max() > 255


def test_compressed_deflated_and_headerless_files_read() -> None:
    assert np.array_equal(read_picture(dicom(film(), syntax=RLELossless)).pixels, film())
    assert np.array_equal(read_picture(dicom(film(), syntax=DeflatedExplicitVRLittleEndian)).pixels, film())
    with_header = pydicom.dcmread(io.BytesIO(dicom(film())))
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, Dataset(with_header), implicit_vr=True, little_endian=True, enforce_file_format=False)
    assert np.array_equal(read_picture(buffer.getvalue()).pixels, film())


@pytest.mark.parametrize(
    ("kind", "mode", "tolerance"), [("PNG", "L", 0), ("PNG", "RGB", 1), ("PNG", "RGBA", 1), ("JPEG", "L", 40), ("PNG", "P", 1)]
)
def test_png_and_jpeg(kind: str, mode: str, tolerance: int) -> None:
    picture = read_picture(image_file(film(), kind, mode), "x")
    assert np.abs(picture.pixels.astype(int) - film()).max() <= tolerance
    assert picture.view == ""


def test_transparency_is_black_and_deep_png_is_read() -> None:
    layers = np.dstack([film(), film(), film(), np.full_like(film(), 255)])
    layers[:20, :, 3] = 0
    assert (read_picture(image_file(layers)).pixels[:20] == 0).all()
    deep = read_picture(image_file(film().astype(np.uint16) * 257))
    assert np.corrcoef(deep.pixels.ravel(), film().ravel())[0, 1] > 0.99


def _bomb() -> bytes:
    """A PNG header of 30,000 x 30,000 with hardly any data."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _deflate_bomb() -> bytes:
    whole = dicom(film(), syntax=DeflatedExplicitVRLittleEndian)
    start = 144 + int.from_bytes(whole[140:144], "little")
    packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    return whole[:start] + b"".join(packer.compress(bytes(1 << 22)) for _ in range(104)) + packer.flush()


COLOURED = np.dstack([film(), film()[::-1], film()[:, ::-1]])
REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty": ("empty", lambda: b"", "x.dcm"),
    "text as DICOM": ("not_dicom", lambda: b"PLANTED-ID is no picture\n" * 20, "x.dcm"),
    "text as PNG": ("not_a_picture", lambda: b"PLANTED-ID is no picture\n" * 20, "x.png"),
    "GIF": ("not_a_picture", lambda: image_file(film(), "GIF"), "x.png"),
    "truncated PNG": ("unreadable", lambda: image_file(film())[:2000], "x.png"),
    "PNG signature alone": ("unreadable", lambda: b"\x89PNG\r\n\x1a\n", "x.png"),
    "truncated JPEG": ("unreadable", lambda: image_file(film(), "JPEG")[:2000], "x.jpg"),
    "truncated DICOM": ("unreadable", lambda: dicom(film())[:4000], "x.dcm"),
    "truncated RLE": ("unreadable", lambda: dicom(film(), syntax=RLELossless)[:4000], "x.dcm"),
    "DICOM preamble alone": ("no_pixels", lambda: bytes(128) + b"DICM", "x.dcm"),
    "no pixels": ("no_pixels", lambda: dicom(None), "x.dcm"),
    "header of 30,000 x 30,000": ("too_large", lambda: dicom(film(), Rows=30000, Columns=30000), "x.dcm"),
    "the same without pixels": ("too_large", lambda: dicom(film(), Rows=30000, Columns=30000, PixelData=None), "x.dcm"),
    "PNG bomb": ("too_large", _bomb, "x.png"),
    "deflate bomb": ("too_large", _deflate_bomb, "x.dcm"),
    "thumbnail": ("too_small", lambda: image_file(film(16)), "x.png"),
    "two frames": ("multi_frame", lambda: dicom(np.vstack([film(), film()]), NumberOfFrames=2, Rows=128), "x.dcm"),
    "colour PNG": ("colour", lambda: image_file(COLOURED), "x.png"),
    "colour DICOM": ("colour", lambda: dicom(COLOURED, SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB"), "x.dcm"),
    "blank": ("blank", lambda: image_file(np.full((64, 64), 7, np.uint8)), "x.png"),
    "CT": ("not_radiography", lambda: dicom(film(), Modality="CT"), "x.dcm"),
    "hand": ("not_chest", lambda: dicom(film(), BodyPartExamined="HAND"), "x.dcm"),
    "dog": ("not_human", lambda: dicom(film(), PatientSpeciesDescription="Canine species"), "x.dcm"),
    "lateral by position": ("lateral", lambda: dicom(film(), ViewPosition="LL"), "x.dcm"),
    "lateral by orientation": ("lateral", lambda: dicom(film(), ViewPosition="", PatientOrientation=["A", "F"]), "x.dcm"),
    "lateral by description": ("lateral", lambda: dicom(film(), ViewPosition="", SeriesDescription="W Chest Lat."), "x.dcm"),
    "unknown compression": ("unreadable", lambda: dicom(film()).replace(b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.9.9\x00"), "x.dcm"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_named_and_tell_nothing(case: str, caplog: pytest.LogCaptureFixture) -> None:
    reason, make, name = REFUSED[case]
    with caplog.at_level(logging.DEBUG), pytest.raises(ImageError) as caught:
        read_picture(make(), name)
    assert isinstance(caught.value, RefusedImageError)
    assert caught.value.reason == reason
    assert str(caught.value) == REASONS[reason]
    assert "PLANTED" not in caplog.text


@pytest.mark.parametrize(
    "attributes",
    [
        {"BodyPartExamined": "CHEST"},
        {"BodyPartExamined": "CHESTABDPELV"},
        {"ViewPosition": "", "SeriesDescription": "CHEST PA AND LATERAL"},
        {"ViewPosition": "", "PatientOrientation": ["L", "F"]},
        {"ViewPosition": "AP", "SeriesDescription": "LAT"},
    ],
)
def test_frontal_chest_films_are_kept(attributes: dict[str, Any]) -> None:
    assert np.array_equal(read_picture(dicom(film(), **attributes)).pixels, film())


def test_lateral_views_are_kept_on_request() -> None:
    assert read_picture(dicom(film(), ViewPosition="LL"), keep_lateral=True).view == "LL"


def test_free_text_in_the_view_position_is_dropped() -> None:
    assert read_picture(dicom(film(), ViewPosition="PLANTED NAME")).view == ""


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_give_a_picture_or_a_refusal(seed: int) -> None:
    source = [dicom(film(64)), dicom(film(64), syntax=RLELossless), image_file(film(64)), image_file(film(64), "JPEG")][seed % 4]
    random = np.random.default_rng(seed)
    damaged = np.frombuffer(source, np.uint8).copy()
    # Half of the cases hit the header, where the damage matters most.
    where = random.integers(0, len(damaged) if seed % 8 < 4 else 800, 20)
    damaged[where] = random.integers(0, 256, 20)
    try:
        picture = read_picture(damaged.tobytes(), "x.dcm")
    except RefusedImageError:
        return
    assert picture.pixels.ndim == 2


def test_encoding_scales_down_and_never_up() -> None:
    picture = read_picture(dicom(film(128)))
    for side, expected in ((64, (64, 64)), (512, (128, 128))):
        content, kind = encode_picture(picture, side)
        with Image.open(io.BytesIO(content)) as image:
            assert (image.size, image.mode, kind) == (expected, "L", "jpg")
    wide = read_picture(image_file(film()[:50]))
    with Image.open(io.BytesIO(encode_picture(wide, 64)[0])) as image:
        assert image.size == (64, 25)


def test_phantom_films_are_never_taken_for_inverted() -> None:
    scores = [polarity_score(generate_study(11, index, 96).image) for index in range(40)]
    assert min(scores) > INVERTED_BELOW


def test_polarity_of_every_real_film() -> None:
    files = sorted((REAL / "images").glob("*.jpg"))
    if not files:
        pytest.skip("the real films are not here")
    scores = []
    for file in files:
        with Image.open(file) as image:
            scores.append(polarity_score(np.asarray(image.convert("L"))))
    assert min(scores) > INVERTED_BELOW + 0.03
    assert np.mean(np.array(scores) > -INVERTED_BELOW) > 0.9
    # An inverse has the opposite score, so the line above says how many mislabelled films are mended.
    assert polarity_score(~np.asarray(Image.open(files[0]).convert("L"))) == pytest.approx(-scores[0], abs=1e-6)


def test_the_real_dicom_files() -> None:
    folder = REAL / "dicom"
    if not folder.is_dir():
        pytest.skip("the real DICOM files are not here")
    plain = read_picture((folder / "siim_cr_pa_jpegbaseline_mono2.dcm").read_bytes())
    twin = read_picture((folder / "siim_cr_pa_jpegbaseline_mono1_relabelled.dcm").read_bytes())
    assert np.array_equal(plain.pixels, twin.pixels)
    assert (plain.polarity_corrected, twin.polarity_corrected) == (False, True)
    assert not is_inverted(plain.pixels)
    dog = (folder / "veterinary_dx_mono1_lateral_dog.dcm").read_bytes()
    with pytest.raises(RefusedImageError) as caught:
        read_picture(dog)
    assert caught.value.reason == "lateral"
    with pytest.raises(RefusedImageError) as caught:
        read_picture(dog, keep_lateral=True)
    assert caught.value.reason == "not_human"
