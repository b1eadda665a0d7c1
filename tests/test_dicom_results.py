"""DICOM results of a draft, read back by pydicom, highdicom and dcmtk."""

from __future__ import annotations

import io
import shutil
import subprocess
from datetime import datetime
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_files import dicom, film
from numpy.typing import NDArray
from pydicom.sr._concepts_dict import concepts
from pydicom.sr.codedict import codes

from ssacl.anatomy import FINDINGS, NODE_INDEX, NODES
from ssacl.data.dicom import Picture, read_picture
from ssacl.errors import DataError
from ssacl.inference.dicom_results import Result, Source, derived_uid, dicom_results
from ssacl.inference.dicom_results_codes import place_code, standard_codes
from ssacl.inference.report import DISCLAIMER, Box, DraftReport, Finding, Sentence

CREATED = datetime(2026, 3, 4, 5, 6, 7)
GRID = 16
STUDY = {
    "StudyInstanceUID": "1.2.3.4",
    "SeriesInstanceUID": "1.2.3.4.1",
    "SOPInstanceUID": "1.2.3.4.1.1",
    "AccessionNumber": "ACC-1",
    "StudyDate": "20260304",
    "StudyDescription": "CHEST PA",
}


def spot(row: int, column: int, side: int = 4) -> NDArray[np.float32]:
    """A map with all of its mass in one square of cells."""
    grid = np.zeros((GRID, GRID), np.float32)
    grid[row : row + side, column : column + side] = 1 / side**2
    return grid


def draft(width: int, height: int, stated: bool = True) -> DraftReport:
    frame = Box(0, 0, width, height)
    effusion = Box(width * 5 / 8, height * 5 / 8, width * 7 / 8, height * 7 / 8)
    sentences = (
        Sentence(
            "There is a left pleural effusion.", ("left costophrenic angle",), "Pleural Effusion", "present", 0.9, effusion, spot(10, 10)
        ),
        Sentence("No pneumothorax.", ("lungs",), "Pneumothorax", "absent", 0.8, Box(0, 0, width / 2, height / 2), spot(2, 2)),
        Sentence("Portable film \u2603.", (), None, "unmentioned", 0.7, None, np.full((GRID, GRID), 1 / GRID**2, np.float32)),
    )
    maps = np.full((len(NODES), GRID, GRID), 1 / GRID**2, np.float32)
    maps[NODE_INDEX["chest"]] = spot(4, 4, 8)
    return DraftReport(
        sentences[0 if stated else 1 :],
        tuple(Finding(name, 0.25 + index / 28, 0.5, index >= 7) for index, name in enumerate(FINDINGS)),
        ("lungs",),
        maps,
        width,
        height,
        frame,
        "ref",
        "model-123",
    )


def made(content: bytes, stated: bool = True) -> tuple[Source, Picture, list[Result]]:
    source, picture = Source.read(content), read_picture(content)
    return source, picture, dicom_results(source, picture, draft(picture.original_width_px, picture.original_height_px, stated), CREATED)


def back(result: Result) -> pydicom.Dataset:
    return pydicom.dcmread(io.BytesIO(result.encoded()))


def texts(item: pydicom.Dataset) -> list[str]:
    own = [str(item.TextValue)] if "TextValue" in item else []
    return own + [text for child in item.get("ContentSequence", ()) for text in texts(child)]


def test_every_result_belongs_to_the_patients_study_and_to_the_film() -> None:
    _, _, results = made(dicom(film(), PatientSex="F", PatientBirthDate="19550101", **STUDY))
    assert [result.kind for result in results] == ["report", "overlay", "segmentation"]
    read = [back(result) for result in results]
    assert [ds.Modality for ds in read] == ["SR", "OT", "SEG"]
    for ds in read:
        assert (ds.StudyInstanceUID, ds.PatientID, ds.PatientName, ds.PatientSex) == ("1.2.3.4", "PLANTED-ID", "PLANTED^NAME", "F")
        assert (ds.AccessionNumber, ds.StudyDescription, ds.PatientBirthDate) == ("ACC-1", "CHEST PA", "19550101")
        assert (ds.Manufacturer, ds.ContentDate, ds.ContentTime) == ("ssacl", "20260304", "050607")
        assert "not for diagnosis" in ds.SeriesDescription
        assert "1.2.3.4.1.1" in str(ds)
    assert len({ds.SeriesInstanceUID for ds in read} | {"1.2.3.4.1"}) == 4


def test_a_retry_makes_the_same_instances_byte_for_byte_and_another_model_others() -> None:
    content = dicom(film(), **STUDY)
    assert [result.encoded() for result in made(content)[2]] == [result.encoded() for result in made(content)[2]]
    assert derived_uid("instance", "1.2", "a") != derived_uid("instance", "1.2", "b")
    assert len(derived_uid("instance", "1.2", "a")) <= 64


def test_the_structured_report_is_an_unverified_draft_with_boxes_and_probabilities() -> None:
    _, picture, results = made(dicom(film(), **STUDY))
    document = highdicom.sr.srread(io.BytesIO(results[0].encoded()))
    assert isinstance(document, highdicom.sr.ComprehensiveSR)
    assert (document.VerificationFlag, document.CompletionFlag, document.PreliminaryFlag) == ("UNVERIFIED", "PARTIAL", "PRELIMINARY")
    said = texts(document)
    assert DISCLAIMER in said
    assert "There is a left pleural effusion." in said
    assert "model-123" in said
    boxes = document.content.get_planar_roi_measurement_groups(reference_type=codes.DCM.ImageRegion)
    assert len(boxes) == 2
    assert np.allclose(boxes[0].roi.value[0], (picture.original_width_px * 5 / 8, picture.original_height_px * 5 / 8))
    assert boxes[0].finding_type == codes.SCT.PleuralEffusion
    assert boxes[0].finding_sites[0].laterality == codes.SCT.Left
    referenced = boxes[0].roi.ContentSequence[0].ReferencedSOPSequence[0]
    assert referenced.ReferencedSOPInstanceUID == "1.2.3.4.1.1"
    groups = document.content.get_image_measurement_groups()
    probabilities = {group.tracking_identifier: group.get_measurements()[0].value for group in groups}
    assert probabilities["Pleural Effusion"] == pytest.approx(25 + 100 * 9 / 28, abs=0.01)
    assert set(FINDINGS) <= set(probabilities)
    evidence = document.CurrentRequestedProcedureEvidenceSequence[0]
    assert evidence.StudyInstanceUID == "1.2.3.4"


def test_the_overlay_is_a_picture_of_the_film() -> None:
    _, _, results = made(dicom(film(), **STUDY))
    ds = back(results[1])
    pixels = ds.pixel_array
    assert pixels.shape[1] == 128
    assert pixels.dtype == np.uint8
    assert np.ptp(pixels.max(axis=2).astype(int) - pixels.min(axis=2)) > 50, "it is in colour"
    assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == "1.2.3.4.1.1"


@pytest.mark.parametrize("stated", [True, False])
def test_the_segmentation_marks_the_region_of_each_stated_sentence(stated: bool) -> None:
    _, _, results = made(dicom(film(), **STUDY), stated)
    segmentation = highdicom.seg.segread(io.BytesIO(results[2].encoded()))
    assert segmentation.number_of_segments == 1
    description = segmentation.get_segment_description(1)
    assert description.segment_label == ("1 Pleural Effusion (present)" if stated else "no finding stated: chest")
    pixels = segmentation.get_pixels_by_source_instance(["1.2.3.4.1.1"], ignore_spatial_locations=True)[0, :, :, 0]
    ys, xs = np.nonzero(pixels)
    assert pixels.shape == (128, 128)
    expected = (80, 112) if stated else (32, 96)
    assert abs(ys.mean() - sum(expected) / 2) < 3
    assert abs(xs.mean() - sum(expected) / 2) < 3
    assert (expected[1] - expected[0]) * 0.5 <= np.ptp(xs) <= (expected[1] - expected[0]) + 2


@pytest.mark.parametrize("orientation", [("L", "F"), ("R", "F"), ("L", "H"), ("R", "H"), ("F", "L"), ("F", "R"), ("H", "L"), ("H", "R")])
def test_boxes_and_regions_lie_on_the_stored_pixels_however_the_film_is_stored(orientation: tuple[str, str]) -> None:
    """A bright spot of the picture is found where the results say, in the file as it is stored."""
    upright = np.full((96, 128), 60, np.uint8)
    upright[60:84, 80:112] = 250
    stored = {
        ("L", "F"): upright,
        ("R", "F"): upright[:, ::-1],
        ("L", "H"): upright[::-1],
        ("R", "H"): upright[::-1, ::-1],
        ("F", "L"): upright.T,
        ("F", "R"): upright.T[::-1],
        ("H", "L"): upright.T[:, ::-1],
        ("H", "R"): upright.T[::-1, ::-1],
    }[orientation]
    # Pixels twice as high as wide: the picture has square ones.
    tall = np.ascontiguousarray(stored[::2])
    content = dicom(tall, PatientOrientation=list(orientation), PixelSpacing=[0.4, 0.2], **STUDY)
    source, picture, results = made(content)
    assert sorted(picture.pixels.shape) == [96, 128]
    height, width = picture.pixels.shape
    box = source.frame.box(Box(width * 80 / 128, height * 60 / 96, width * 112 / 128, height * 84 / 96), width, height)
    inside = np.zeros(tall.shape, bool)
    inside[round(box.y0) : round(box.y1), round(box.x0) : round(box.x1)] = True
    assert np.array_equal(inside, tall > 200)
    segmentation = highdicom.seg.segread(io.BytesIO(results[2].encoded()))
    mask = segmentation.get_pixels_by_source_instance(["1.2.3.4.1.1"], ignore_spatial_locations=True)[0, :, :, 0] > 0
    # The draft's map has its mass at 5/8 to 7/8 both ways, which the spot covers.
    assert mask.shape == tall.shape
    assert (mask & (tall > 200)).sum() > 0.7 * mask.sum()


def test_identifiers_stand_as_the_archive_wrote_them() -> None:
    """Values that highdicom refuses, and names in other scripts, are copied all the same."""
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    odd = {"PatientSex": "U", "StudyDate": "2026.03.04", "PatientName": name, "SpecificCharacterSet": ["", "ISO 2022 IR 87"]}
    content = dicom(film(), **{**STUDY, **odd})
    for result in made(content)[2]:
        ds = back(result)
        assert (str(ds.PatientName), ds.PatientSex) == (name, "U")
        assert str(ds["StudyDate"].value) == "2026.03.04"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PNG?" + bytes(200), "is none"),
        (dicom(film()), "no StudyInstanceUID, SeriesInstanceUID"),
        (dicom(film(), SOPClassUID="1.2.840.10008.5.1.4.1.1.2", **STUDY), "another class"),
    ],
)
def test_what_has_no_place_in_an_archive_is_named(content: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        Source.read(content)
    assert "PLANTED" not in str(caught.value)


def test_the_codes_are_the_standards() -> None:
    known = {(code, scheme) for scheme in ("SCT", "DCM") for entry in concepts[scheme].values() for code in entry}
    assert {(value, scheme) for value, scheme, _ in standard_codes()} <= known
    assert {place_code(node) for node in NODES} >= {place_code("carina")}
    assert len({place_code(node) for node in NODES}) == len(NODES)


def test_nothing_of_the_patient_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"):
        made(dicom(film(), **STUDY))
    assert "PLANTED" not in caplog.text
    assert "1.2.3.4" not in caplog.text


@pytest.mark.external
def test_dcmtk_reads_the_results(tmp_path: Path) -> None:
    if not shutil.which("dsrdump") or not shutil.which("dcmdump"):
        pytest.skip("dcmtk is not installed: make setup-servers (Debian package dcmtk)")
    for result in made(dicom(film(), **STUDY))[2]:
        path = tmp_path / f"{result.kind}.dcm"
        path.write_bytes(result.encoded())
        dumped = subprocess.run(["dcmdump", "+E", str(path)], capture_output=True, text=True, check=True)
        assert "PLANTED-ID" in dumped.stdout
        assert dumped.stderr == ""
    shown = subprocess.run(["dsrdump", "+Pl", str(tmp_path / "report.dcm")], capture_output=True, text=True, check=True)
    assert "left pleural effusion" in shown.stdout
    assert "UNVERIFIED" in shown.stdout.upper()
    assert "E:" not in shown.stderr, shown.stderr
