"""A phantom study as a DICOM file: Digital X-Ray Image Storage - For Presentation (PS3.3 A.26)."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from numpy.typing import NDArray

from ssacl import __version__
from ssacl.errors import SSACLError
from ssacl.phantom.study import PhantomStudy

DX_FOR_PRESENTATION = "1.2.840.10008.5.1.4.1.1.1.1"
_FAMILY = ("Ashgrove", "Birkby", "Calloway", "Dunmere", "Elstow", "Farrow", "Glenholt", "Harwick", "Inglemoor", "Jessop", "Kelby", "Lorrin")
_GIVEN = ("Avery", "Blair", "Carey", "Devon", "Emery", "Finley", "Greer", "Harper", "Indigo", "Jules", "Kerry", "Lane")
FILM_MM = 430.0
"""Side of the imaged field."""


def uid(*parts: object) -> str:
    """A UID under the root 2.25 (PS3.5 B.2): the first 128 bits of a SHA-256 over `parts`, as a decimal UUID."""
    digest = hashlib.sha256("/".join(str(part) for part in ("ssacl phantom", *parts)).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def dicom_bytes(study: PhantomStudy) -> tuple[bytes, str]:
    """The study as a DICOM file, and its pixel digest (SHA-256 of the PixelData bytes, hex).

    Pixels are 12 bits in 16, with a window that shows all of the picture; about one study in ten is MONOCHROME1.
    Everything that would identify a person is made up from hashes, for de-identification to find.

    Raises
    ------
    SSACLError
        pydicom is not installed.
    """
    try:
        from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian
    except ImportError as error:
        raise SSACLError("Writing DICOM needs pydicom. Install the extra: pip install 'ssacl[dicom]'.") from error

    draw = hashlib.sha256(f"header {study.study_id}".encode()).digest()
    person = hashlib.sha256(f"person {study.patient_id}".encode()).digest()
    inverted = draw[0] < 26
    pixels, low, high = _stored(study.detector, draw, inverted)
    content = pixels.astype("<u2").tobytes()
    rows, columns = pixels.shape
    year, month, day = 2015 + draw[1] % 8, 1 + draw[2] % 12, 1 + draw[3] % 28
    date, time = f"{year}{month:02d}{day:02d}", f"{draw[4] % 24:02d}{draw[5] % 60:02d}{draw[6] % 60:02d}"

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DX_FOR_PRESENTATION
    meta.MediaStorageSOPInstanceUID = uid("instance", study.study_id)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = uid("implementation")
    meta.ImplementationVersionName = f"SSACL_{__version__}"[:16]

    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    # Patient, study (PS3.3 C.7.1.1, C.7.2.1)
    ds.PatientName = f"{_FAMILY[person[0] % len(_FAMILY)]}^{_GIVEN[person[1] % len(_GIVEN)]}"
    ds.PatientID, ds.IssuerOfPatientID = study.patient_id, "SSACL PHANTOM"
    ds.PatientBirthDate = f"{1930 + person[2] % 65}{1 + person[3] % 12:02d}{1 + person[4] % 28:02d}"
    ds.PatientSex = "FM"[person[5] % 2]
    ds.StudyInstanceUID, ds.StudyID, ds.AccessionNumber = uid("study", study.study_id), study.study_id, "AC" + study.study_id[2:]
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = date
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = time
    ds.ReferringPhysicianName = f"{_FAMILY[draw[7] % len(_FAMILY)]}^{_GIVEN[draw[8] % len(_GIVEN)]}"
    ds.StudyDescription = "CHEST RADIOGRAPH"
    # Series, equipment (C.7.3.1, C.8.11.1, C.7.5.1)
    ds.Modality, ds.PresentationIntentType = "DX", "FOR PRESENTATION"
    ds.SeriesInstanceUID, ds.SeriesNumber = uid("series", study.study_id), 1
    ds.SeriesDescription = f"CHEST {study.view}"
    ds.Manufacturer, ds.ManufacturerModelName = "SSACL", "Phantom"
    ds.InstitutionName, ds.StationName = "Phantom General Hospital", "PHANTOM1"
    ds.DeviceSerialNumber, ds.SoftwareVersions = "1", __version__
    # Image, pixels (C.7.6.1, C.7.6.3, C.8.11.3)
    ds.InstanceNumber, ds.ImageType = 1, ["ORIGINAL", "PRIMARY", ""]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    ds.PresentationLUTShape = "INVERSE" if inverted else "IDENTITY"
    ds.Rows, ds.Columns = rows, columns
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", 1 if inverted else -1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"
    ds.LossyImageCompression, ds.BurnedInAnnotation = "00", "NO"
    # A linear window maps [centre - 0.5 - (width - 1) / 2, ... + (width - 1)] to the full range (C.11.2.1.2.1).
    width = high - low + 1
    ds.WindowCenter, ds.WindowWidth = low + width / 2, width
    # Anatomy, detector, positioning (C.8.11.2, C.8.11.4, C.8.11.5)
    region = Dataset()
    region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "51185008", "SCT", "Chest"
    ds.BodyPartExamined, ds.ImageLaterality, ds.AnatomicRegionSequence = "CHEST", "U", [region]
    ds.DetectorType = "DIRECT"
    spacing = round(FILM_MM / rows, 5)
    ds.ImagerPixelSpacing = [spacing, spacing]
    ds.ViewPosition, ds.PatientOrientation = study.view, ["L", "F"]
    ds.AcquisitionContextSequence = []
    ds.PixelData = content
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue(), hashlib.sha256(content).hexdigest()


def _stored(detector: NDArray[np.uint16], draw: bytes, inverted: bool) -> tuple[NDArray[np.uint16], int, int]:
    """Stored pixels and the range that the window shows; part of the studies use a part of the 12 bits."""
    low, high = (0, 4095) if draw[9] < 128 else (draw[10], 4095 - 4 * draw[11])
    picture = 4095 - detector if inverted else detector
    if (low, high) == (0, 4095):
        return picture, low, high
    return (low + (picture.astype(np.uint32) * (high - low) + 2047) // 4095).astype(np.uint16), low, high
