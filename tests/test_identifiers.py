"""No identifier survives: unique strings planted wherever a source can carry text, looked for in everything that ingest leaves behind."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from dicom_files import dicom, film
from PIL import Image
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset

from ssacl.data.deidentify import identifiers_in, keyed_hash
from ssacl.data.deidentify_dicom import METHOD, deidentified, deidentify_files
from ssacl.data.dicom import read_picture
from ssacl.data.ingest import IngestSettings, run_local
from ssacl.data.refusals import RefusedImageError
from ssacl.data.sources import SourceOptions

SECRET = "a secret of the tests"
SETTINGS = IngestSettings(key_secret=SECRET, shard_size=4)
# One attribute or more of every VR that holds text, from the header's many.
BY_VR = {
    "AE": ["RetrieveAETitle", "StationAETitle", "ScheduledStationAETitle"],
    "AS": ["PatientAge"],
    "CS": ["ViewPosition", "ImageLaterality", "BodyPartExamined", "PatientSex", "ConversionType", "PatientOrientation"],
    "DA": ["StudyDate", "PatientBirthDate", "SeriesDate", "ContentDate", "LastMenstrualDate"],
    "DS": ["PatientWeight", "KVP"],
    "DT": ["AcquisitionDateTime"],
    "IS": ["InstanceNumber", "ExposureTime"],
    "LO": ["PatientID", "OtherPatientIDs", "InstitutionName", "StudyDescription", "SeriesDescription", "Manufacturer", "ProtocolName"],
    "LT": ["PatientComments", "AdditionalPatientHistory", "IdentifyingComments"],
    "PN": ["PatientName", "ReferringPhysicianName", "OperatorsName", "OtherPatientNames", "NameOfPhysiciansReadingStudy"],
    "SH": ["AccessionNumber", "StudyID", "StationName", "PerformedProcedureStepID"],
    "ST": ["InstitutionAddress", "DerivationDescription"],
    "TM": ["StudyTime", "PatientBirthTime"],
    "UC": ["StrainDescription", "LongCodeValue"],
    "UI": ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"],
    "UR": ["RetrieveURL", "CodingSchemeURL"],
    "UT": ["TextValue", "PixelDataProviderURL"],
}
# What a value may look like for its VR; all of them can be found again.
FORM = {
    "AS": "097Y",
    "DA": "19{n:02d}1017",
    "DT": "19{n:02d}1017112233.4",
    "TM": "11{n:02d}44.777",
    "DS": "7.73{n:03d}",
    "IS": "77331{n:02d}",
}
FORM |= {"UI": "1.2.77331.{n}", "UR": "http://planted{n}.example/zyxwvut", "PN": "Zyxwvut{n}^Quentin{n}", "CS": "ZYXWVUT{n}"}


def planted() -> dict[str, tuple[str, str]]:
    """Keyword -> VR and a value found nowhere else."""
    keywords = [(vr, keyword) for vr, group in BY_VR.items() for keyword in group]
    return {keyword: (vr, FORM.get(vr, "Zyxwvut{n}").format(n=number + 11)) for number, (vr, keyword) in enumerate(keywords)}


def marks() -> set[str]:
    """What must not be found: the planted values, and the parts of names."""
    values = {value for _, value in planted().values()} | {"zyxwvut", "quentin", "private77331", "nested77331"}
    # "097Y" and view words of four letters occur in compressed pixels by chance.
    return {value.lower() for value in values if len(value) > 5}


def carrying(pixels: object = None) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(dicom(film(64) if pixels is None else pixels)))  # type: ignore[arg-type]
    with pydicom.config.disable_value_validation():
        for keyword, (vr, value) in planted().items():
            ds.add_new(pydicom.datadict.tag_for_keyword(keyword) or 0, vr, value)
        block = ds.private_block(0x0029, "ZYXWVUT PRIVATE", create=True)
        block.add_new(0x10, "LO", "private77331")
        block.add_new(0x11, "OB", b"private77331")
        item, inner = Dataset(), Dataset()
        inner.PatientName, inner.StudyDescription = "Nested77331^Quentin99", "nested77331"
        inner.ReferencedSOPInstanceUID = "1.2.77331.99"
        item.RequestedProcedureDescription, item.ReferencedStudySequence = "nested77331", [inner]
        ds.RequestAttributesSequence = [item]
        ds.ViewCodeSequence = [inner]
        overlay = ds.private_block(0x0031, "ZYXWVUT2", create=True)
        overlay.add_new(0x01, "SQ", [item])
        ds.add_new(0x60000022, "LO", "Zyxwvut overlay")
        ds.add_new(0x00420011, "OB", b"zyxwvut document")
        ds.BodyPartExamined, ds.Modality, ds.ViewPosition = "CHEST ZYXWVUT", "DX", "PA ZYXWVUT"
        buffer = io.BytesIO()
        ds.save_as(buffer)
    return buffer.getvalue()


def everything_in(folder: Path) -> bytes:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"\n".join(path.relative_to(folder).as_posix().encode() + b"\n" + path.read_bytes() for path in files)


def found_in(content: bytes | str) -> list[str]:
    text = content.encode() if isinstance(content, str) else content
    return [mark for mark in sorted(marks()) if mark.encode() in text.lower()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A DICOM folder with a sound film, a damaged one and one of each format's odd ends, in folders and files named for a patient."""
    folder = tmp_path / "in" / "Zyxwvut_Quentin" / "Zyxwvut_Study"
    folder.mkdir(parents=True)
    content = carrying()
    (folder / "Zyxwvut^Quentin.dcm").write_bytes(content)
    (folder / "Zyxwvut2.dcm").write_bytes(content[: len(content) // 2])
    (folder / "Zyxwvut3.dcm").write_bytes(b"Zyxwvut" * 99)
    damaged = bytearray(content)
    damaged[200:3000:37] = b"\xff" * len(damaged[200:3000:37])
    (folder / "Zyxwvut4.dcm").write_bytes(bytes(damaged))
    values = {keyword: value for keyword, (_, value) in planted().items()}
    (folder / "report.txt").write_text(
        f"NAME: Zyxwvut Quentin\nMRN: {values['PatientID']}  DOB: 10/17/1922\nACCESSION: {values['AccessionNumber']}\n"
        f"REFERRING PHYSICIAN: {values['ReferringPhysicianName'].replace('^', ', ')}\nINDICATION: Zyxwvut fell.\n"
        f"FINDINGS: {values['PatientName'].replace('^', ' ')} has a small left effusion. Compared with "
        f"{written(values['StudyDate'])}, {values['StudyInstanceUID']}. Private77331, Nested77331.\n"
        f"IMPRESSION: Effusion in {values['OtherPatientIDs']}, seen at {values['InstitutionName']} by "
        f"{values['OperatorsName'].split('^')[0]}.\n"
    )
    return tmp_path / "in"


def written(date: str) -> str:
    return f"{int(date[4:6])}/{int(date[6:])}/{date[:4]}"


def test_the_plants_cover_every_text_vr() -> None:
    read = pydicom.dcmread(io.BytesIO(carrying()))
    assert {element.VR for element in read} >= set(BY_VR) | {"SQ"}
    assert len(found_in(carrying())) > 35


def test_nothing_planted_survives_ingest(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        summary = run_local("dicom-dir", source, str(tmp_path / "set"), SETTINGS)
    assert sum(summary.num_samples.values()) == 1
    assert sum(summary.rejects.values()) == 3
    everything = everything_in(tmp_path / "set")
    assert found_in(everything) == []
    assert b"small left effusion" in everything
    assert SECRET.encode() not in everything
    output = caplog.text + "".join(capfd.readouterr()) + summary.describe()
    assert found_in(output) == []
    assert f"{written(planted()['StudyDate'][1])}".encode() not in everything


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_nothing_planted_survives_in_pictures_and_tables(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from PIL import PngImagePlugin

    folder = tmp_path / "Zyxwvut"
    folder.mkdir()
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Zyxwvut11")
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = "Zyxwvut12", "Quentin13"
    extra = {"pnginfo": info, "exif": exif} if kind == "PNG" else {"exif": exif, "comment": b"Zyxwvut14"}
    Image.fromarray(film(64)).save(folder / f"Zyxwvut15.{kind.lower()}", kind, **extra)
    name = f"Zyxwvut15.{kind.lower()}"
    (folder / "Zyxwvut.csv").write_text(
        f"file,who,visit,text,sight\n{name},Zyxwvut16,Zyxwvut17,FINDINGS: Zyxwvut16 is well; see Zyxwvut17.,Zyxwvut18\n"
        "Zyxwvut19.png,Zyxwvut16,Zyxwvut20,,PA\n"
    )
    columns = {"image": "file", "patient": "who", "study": "visit", "report": "text", "view": "sight"}
    with caplog.at_level(logging.DEBUG):
        summary = run_local("csv", folder / "Zyxwvut.csv", str(tmp_path / "set"), SETTINGS, SourceOptions(columns))
    assert summary.rejects == {"missing_file": 1}
    everything = everything_in(tmp_path / "set")
    assert b"is well" in everything
    assert found_in(everything) == []
    assert found_in((caplog.text + "".join(capfd.readouterr())).replace(str(tmp_path), "")) == []


def test_names_dates_and_private_codes_are_known_and_words_are_left() -> None:
    content = dicom(
        film(64), StudyDescription="CHEST PA", StudyDate="20240305", PatientName="Müller^Jörg", SpecificCharacterSet="ISO_IR 100"
    )
    known = identifiers_in(content)
    assert {"Müller", "Jörg", "PLANTED-ID", "20240305", "03/05/2024", "5.3.2024", "March 5, 2024", "5 Mar 2024"} <= known
    assert not any("CHEST" in value for value in known)


def elements(ds: Dataset) -> Iterator[pydicom.DataElement]:
    yield from (element for element in ds.iterall())
    yield from ds.file_meta


def test_a_deidentified_file_says_so_and_holds_nothing_planted() -> None:
    ds, is_flagged = deidentified(carrying(), SECRET)
    assert not is_flagged
    assert (ds.PatientIdentityRemoved, ds.DeidentificationMethod) == ("YES", METHOD)
    assert (ds.BurnedInAnnotation, ds.LongitudinalTemporalInformationModified) == ("NO", "MODIFIED")
    assert [item.CodeValue for item in ds.DeidentificationMethodCodeSequence] == ["113100", "113107"]
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    # Times of day stay; with shifted dates they tell no day.
    kept = {planted()["StudyTime"][1], planted()["KVP"][1], planted()["InstanceNumber"][1], planted()["ExposureTime"][1]}
    assert set(found_in(buffer.getvalue())) <= kept
    assert not any(element.tag.is_private or element.tag.group in range(0x6000, 0x6100) for element in elements(ds))
    assert ds.PatientID == keyed_hash(SECRET, "patient", planted()["PatientID"][1])
    for keyword in ("AccessionNumber", "ReferringPhysicianName", "PatientBirthDate", "StudyID"):
        # Type 2: they must be there, and may be empty.
        assert ds[keyword].is_empty, keyword
    read = read_picture(buffer.getvalue())
    assert (read.pixels == read_picture(carrying()).pixels).all()


def test_uids_and_dates_are_consistent_within_a_project_and_differ_between_two() -> None:
    identity = {
        "StudyInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": "1.2.3.4.5",
        "StudyDate": "20240305",
        "AcquisitionDateTime": "20240307101112.5",
    }
    one, _ = deidentified(dicom(film(64), **identity), SECRET)
    two, _ = deidentified(dicom(film(64), **(identity | {"StudyDate": "20240312"})), SECRET)
    other, _ = deidentified(dicom(film(64), **identity), "another secret here")
    assert one.StudyInstanceUID == two.StudyInstanceUID != other.StudyInstanceUID
    assert one.StudyInstanceUID.startswith("2.25.")
    assert one.StudyInstanceUID.is_valid
    assert one.SOPInstanceUID == one.file_meta.MediaStorageSOPInstanceUID
    assert one.SOPClassUID == "1.2.840.10008.5.1.4.1.1.1.1"
    days = [pydicom.valuerep.DA(each) for each in (one.StudyDate, two.StudyDate, other.StudyDate)]
    assert days[0] is not None
    assert days[1] is not None
    assert (days[1] - days[0]).days == 7
    assert one.StudyDate not in {"20240305", other.StudyDate}
    assert one.AcquisitionDateTime[8:] == "101112.5"


def with_text() -> bytes:
    """A film with a line of text burned in."""
    from PIL import ImageDraw, ImageFont

    image = Image.fromarray(film(512))
    ImageDraw.Draw(image).text((20, 20), "ZYXWVUT QUENTIN 17.10.1922", fill=255, font=ImageFont.load_default(18))
    import numpy as np

    return dicom(np.asarray(image))


def test_burned_in_text_is_flagged_and_blanked_on_request(tmp_path: Path) -> None:
    plain = read_picture(dicom(film(512)), find_text=True)
    assert (plain.burned_in, plain.text_boxes) == ("", ())
    found = read_picture(with_text(), find_text=True)
    assert found.burned_in == "suspected"
    assert read_picture(dicom(film(512), BurnedInAnnotation="YES")).burned_in == "declared"
    blanked = read_picture(with_text(), blank_text=True)
    # White strokes are gone where they were.
    assert (found.pixels[20:40, 20:260] > 240).mean() > 0.05
    assert (blanked.pixels[20:40, 20:260] > 240).mean() < 0.005
    ds, is_flagged = deidentified(with_text(), SECRET)
    assert (ds.BurnedInAnnotation, is_flagged) == ("YES", True)
    ds, is_flagged = deidentified(with_text(), SECRET, blank_text=True)
    assert (ds.BurnedInAnnotation, is_flagged) == ("NO", False)
    assert ds.DeidentificationMethodCodeSequence[-1].CodeValue == "113101"
    assert (ds.pixel_array[20:40, 20:260] > 240).mean() < 0.005
    settings = IngestSettings(key_secret=SECRET, blank_text=True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.dcm").write_bytes(with_text())
    run_local("dicom-dir", tmp_path / "in", str(tmp_path / "set"), settings)
    assert b'"burned_in":"suspected"' in everything_in(tmp_path / "set")


def test_a_folder_is_deidentified_under_names_that_tell_nothing(source: Path, tmp_path: Path) -> None:
    done = deidentify_files(source, tmp_path / "out", SECRET)
    assert done.num_written == 1
    assert sum(done.refused.values()) == 4
    names = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.dcm")]
    assert len(names) == 1
    assert re.fullmatch(r"[0-9a-f]{24}/[0-9a-f]{24}/[0-9a-f]{24}\.dcm", names[0])
    assert keyword_for_tag(0x00120062) == "PatientIdentityRemoved"


def test_what_ingest_would_not_take_is_not_deidentified() -> None:
    for content, reason in ((dicom(film(), Modality="CT"), "not_radiography"), (b"text", "not_a_picture")):
        with pytest.raises(RefusedImageError) as caught:
            deidentified(content, SECRET)
        assert caught.value.reason == reason
