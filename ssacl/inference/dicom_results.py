"""DICOM results of a draft: a Structured Report, the evidence overlay and a segmentation, in the study of the film that was read.

They go back to the archive that the film came from, so they carry its identifiers. Nothing of them enters a log. UIDs follow from the
source instance and the model, so that a repeated request makes the same instances.
"""

from __future__ import annotations

import io
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import ssacl
from ssacl.data.dicom import Picture
from ssacl.data.dicom_guard import is_dicom
from ssacl.data.quiet import quiet_loggers
from ssacl.errors import DataError
from ssacl.inference.dicom_results_frame import StoredFrame
from ssacl.inference.report import DraftReport

if TYPE_CHECKING:
    from pydicom import Dataset

SOURCE_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.1": "Computed Radiography Image Storage",
    "1.2.840.10008.5.1.4.1.1.1.1": "Digital X-Ray Image Storage - For Presentation",
    "1.2.840.10008.5.1.4.1.1.1.1.1": "Digital X-Ray Image Storage - For Processing",
    "1.2.840.10008.5.1.4.1.1.7": "Secondary Capture Image Storage",
}
"""SOP classes of films that results are made for."""
MANUFACTURER = MODEL_NAME = "ssacl"
"""What every result carries as Manufacturer and ManufacturerModelName; the gateway knows its own results by it."""
_NAMESPACE = uuid.UUID("3f0f4b9e-6d1c-5a53-9c55-0f6f7a2a8d11")
_SERIES_NUMBERS = {"report": 9801, "overlay": 9802, "segmentation": 9803}
_REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "Rows", "Columns")


@dataclass(frozen=True)
class Source:
    """A film as results refer to it."""

    header: Dataset
    """Its data set without pixels."""
    stand_in: Dataset
    """What highdicom is given: the references and geometry of the film, with an empty patient and study. Those are copied as they stand
    afterwards, since highdicom refuses values that archives do hold."""
    frame: StoredFrame

    @classmethod
    def read(cls, content: bytes) -> Source:
        """
        Raises
        ------
        DataError
            No DICOM file, or one without the identifiers that a result must refer to.
        """
        import pydicom

        if not is_dicom(content):
            raise DataError("DICOM results need a DICOM film; this is none. Ask for JSON or PNG instead.")
        quiet_loggers("pydicom", "highdicom")
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        try:
            header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, force=content[128:132] != b"DICM")
        # pydicom raises whatever it likes on damaged files; its texts may quote the header.
        except Exception:
            raise DataError("The film's header cannot be read, so no DICOM results can refer to it. Export it again.") from None
        missing = [keyword for keyword in _REQUIRED if not header.get(keyword)]
        if missing:
            raise DataError(f"The film has no {', '.join(missing)}, which DICOM results refer to. Export it again from its archive.")
        if header.SOPClassUID not in SOURCE_CLASSES:
            raise DataError(f"DICOM results are made for {', '.join(SOURCE_CLASSES.values())}; this film is of another class.")
        return cls(header, _stand_in(header), StoredFrame.of(header))


@dataclass(frozen=True)
class Result:
    """One made instance."""

    kind: str
    """"report", "overlay" or "segmentation"."""
    ds: Dataset

    def encoded(self) -> bytes:
        """The instance as a DICOM file."""
        buffer = io.BytesIO()
        self.ds.save_as(buffer, enforce_file_format=True)
        return buffer.getvalue()


def dicom_results(source: Source, picture: Picture, report: DraftReport, created: datetime) -> list[Result]:
    """The results of one draft, ready for an archive.

    Parameters
    ----------
    source
        The film.
    picture
        What `read_picture` made of it.
    report
        The draft made from that picture.
    created
        When; it stands in the instances.

    Returns
    -------
    Structured Report, overlay and segmentation. No segmentation where every map is flat: there is no region to mark.

    Raises
    ------
    ConfigError
        The picture is not the report's.
    """
    from ssacl.inference.dicom_results_pictures import evidence_segmentation, overlay_capture
    from ssacl.inference.dicom_results_sr import structured_report

    made = [("report", structured_report), ("overlay", overlay_capture), ("segmentation", evidence_segmentation)]
    results = []
    for kind, make in made:
        ds = make(source, picture, report, _common(kind, source, report, created))
        if ds is None:
            continue
        ds.copy_patient_and_study_information(source.header)
        if "SpecificCharacterSet" in source.header:
            ds.SpecificCharacterSet = source.header.SpecificCharacterSet
        _fix(ds, created)
        results.append(Result(kind, ds))
    return results


def derived_uid(*parts: str) -> str:
    """A UID (2.25. + UUID, PS3.5 B.2) that is the same for the same parts."""
    return f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join(parts)).int}"


def _fix(ds: Dataset, created: datetime) -> None:
    """Put what highdicom takes from the clock or draws at random on the time and the instance."""
    day, time = created.strftime("%Y%m%d"), created.strftime("%H%M%S")
    values = {
        "InstanceCreationDate": day,
        "InstanceCreationTime": time,
        "DateOfSecondaryCapture": day,
        "TimeOfSecondaryCapture": time,
        "ContributionDateTime": day + time,
        "DimensionOrganizationUID": derived_uid("dimensions", str(ds.SOPInstanceUID)),
    }
    for element in ds.iterall():
        if element.keyword in values:
            element.value = values[element.keyword]


def _common(kind: str, source: Source, report: DraftReport, created: datetime) -> dict[str, Any]:
    """What highdicom is told of every result alike."""
    film, version = str(source.header.SOPInstanceUID), report.model_version
    return {
        "series_instance_uid": derived_uid("series", kind, film, version),
        "sop_instance_uid": derived_uid("instance", kind, film, version),
        "series_number": _SERIES_NUMBERS[kind],
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MODEL_NAME,
        "software_versions": (f"ssacl {ssacl.__version__}", f"model {version}"[:64]),
        "device_serial_number": version[:64],
        "series_description": f"PRELIMINARY draft {kind}, not for diagnosis",
        "content_date": created.date(),
        "content_time": created.time().replace(microsecond=0),
        "specific_character_set": None,
    }


def _stand_in(header: Dataset) -> Dataset:
    from pydicom import Dataset

    ds = Dataset()
    for keyword in _REQUIRED:
        setattr(ds, keyword, header[keyword].value)
    ds.Modality = str(header.get("Modality") or "OT")
    for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID"):
        setattr(ds, keyword, "")
    if header.get("ImageType"):
        ds.ImageType = header.ImageType
    if str(header.get("LossyImageCompression")) == "01":
        for keyword in ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod"):
            if header.get(keyword):
                setattr(ds, keyword, header[keyword].value)
    return ds
