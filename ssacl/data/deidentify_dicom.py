"""De-identified DICOM files, after the Basic Application Level Confidentiality Profile with modified dates (PS3.15 annex E).

What the profile lists is emptied, replaced or removed as its table says (the tables of dicom-anonymizer); of what it does not list only an
allowlist stays, so that free text, private elements, overlays and documents go without being known one by one. UIDs, patient and study
become keyed hashes: the same within a project, and the patient's is the one in the shards.
"""

from __future__ import annotations

import copy
import datetime
import functools
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssacl.data.burned_in import blanked, text_boxes
from ssacl.data.deidentify import keyed_hash, quietly
from ssacl.data.dicom import MAX_BYTES, known_view, read_picture
from ssacl.data.refusals import RefusedImageError
from ssacl.data.render import render, stored_values
from ssacl.data.sources.place import SourcePlace
from ssacl.data.storage import open_storage

if TYPE_CHECKING:
    from pydicom import DataElement, Dataset

METHOD = "PS3.15 basic profile, modified dates; ssacl"
_TABLE = "dicomfields_2026c"
_MAX_SHIFT_DAYS = 3650
_SHIFTED = {"StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "AcquisitionDateTime", "InstanceCreationDate"}
_TIMES = {"StudyTime", "SeriesTime", "AcquisitionTime", "ContentTime", "InstanceCreationTime"}
_KEPT = frozenset(
    """
    ImageType SOPClassUID Modality PresentationIntentType ConversionType BodyPartExamined ViewPosition KVP
    Exposure ExposureTime XRayTubeCurrent DistanceSourceToDetector DistanceSourceToPatient ImagerPixelSpacing PixelSpacing
    PixelAspectRatio PixelSpacingCalibrationType InstanceNumber SeriesNumber PatientOrientation ImageLaterality Laterality
    SamplesPerPixel PhotometricInterpretation PlanarConfiguration Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation
    SmallestImagePixelValue LargestImagePixelValue PixelPaddingValue PixelPaddingRangeLimit PixelIntensityRelationship
    PixelIntensityRelationshipSign WindowCenter WindowWidth VOILUTFunction RescaleIntercept RescaleSlope RescaleType
    LossyImageCompression LossyImageCompressionRatio LossyImageCompressionMethod PresentationLUTShape PixelData FieldOfViewShape
    FieldOfViewRotation FieldOfViewHorizontalFlip NumberOfFrames VOILUTSequence ModalityLUTSequence
    LUTDescriptor LUTData ModalityLUTType
    """.split()  # noqa: SIM905
)
_TERMS = frozenset(
    """
    ORIGINAL DERIVED PRIMARY SECONDARY FOR_PRESENTATION FOR_PROCESSING CR DX DR RG OT CHEST THORAX L R U B A P F H LF RF LH RH AF PF AH PH
    DV DI DF WSD SD SI DRW SYN GEOMETRY FIDUCIAL MONOCHROME1 MONOCHROME2 RGB YBR_FULL YBR_FULL_422 YBR_RCT YBR_ICT LINEAR LINEAR_EXACT
    SIGMOID IDENTITY INVERSE LIN LOG DISP US HU OD UNSPECIFIED YES NO 00 01 ISO_10918_1 ISO_14495_1 ISO_15444_1 RECTANGLE ROUND HEXAGONAL
    """.split()  # noqa: SIM905
) | {""}
"""What a code string that is kept may say. Another value may be anything: it is emptied."""
_NUMBERS = {"DS", "IS", "US", "SS", "UL", "SL", "FL", "FD", "OB", "OW"}


@dataclass(frozen=True)
class DeidentifiedFiles:
    """What `deidentify_files` did."""

    num_written: int
    num_flagged: int
    """Written with burned-in text declared or suspected and not blanked: look at them."""
    refused: dict[str, int]
    """Files left out, by reason."""


def deidentified(content: bytes, secret: str, *, blank_text: bool = False) -> tuple[Dataset, bool]:
    """A chest film's DICOM file without what identifies the patient, and whether burned-in text is left in it.

    Parameters
    ----------
    content
        The file's bytes.
    secret
        The project's key (`ssacl.data.deidentify.key_secret`).
    blank_text
        Fill what looks like burned-in text; the pixels are then written uncompressed.

    Raises
    ------
    RefusedImageError
        It is no radiograph of a chest that ingest would take (lateral ones are).
    """
    import pydicom

    picture = read_picture(content, keep_lateral=True, find_text=True)
    if not picture.modality:
        raise RefusedImageError("not_dicom")
    with quietly():
        try:
            ds = pydicom.dcmread(io.BytesIO(content), force=True)
            is_blanked = bool(blank_text and picture.text_boxes and _blank(ds))
            is_flagged = bool(picture.burned_in) and not is_blanked
            return _rewritten(ds, secret, is_flagged, is_blanked), is_flagged
        # The picture was read, and the header is too damaged to be written again.
        except Exception:
            raise RefusedImageError("unreadable") from None


def deidentify_files(source: str | Path, target: str | Path, secret: str, *, blank_text: bool = False) -> DeidentifiedFiles:
    """Write a de-identified copy of every film below `source` to PATIENT/STUDY/INSTANCE.dcm at `target`, all three keyed hashes.

    Raises
    ------
    DataError
        Nothing is there.
    StorageError
        Either place cannot be reached, or is full.
    """
    place, out = SourcePlace.at(source), open_storage(target)
    refused: Counter[str] = Counter()
    num_written = num_flagged = 0
    for key in [place.key] if place.key else place.files():
        try:
            ds, is_flagged = deidentified(place.image(key).read(MAX_BYTES + 1), secret, blank_text=blank_text)
            buffer = io.BytesIO()
            with quietly():
                ds.save_as(buffer, enforce_file_format=True)
        except RefusedImageError as error:
            refused[error.reason] += 1
            continue
        study, instance = (keyed_hash(secret, kind, str(ds.get(kind))) for kind in ("StudyInstanceUID", "SOPInstanceUID"))
        out.write(f"{ds.PatientID}/{study}/{instance}.dcm", buffer.getvalue())
        num_written, num_flagged = num_written + 1, num_flagged + is_flagged
    return DeidentifiedFiles(num_written, num_flagged, dict(sorted(refused.items())))


def _rewritten(ds: Dataset, secret: str, is_flagged: bool, is_blanked: bool) -> Dataset:
    import pydicom

    patient, kept = str(ds.get("PatientID") or ds.get("StudyInstanceUID") or ""), copy.deepcopy(ds)
    _clean(kept, secret, _shift_days(secret, patient))
    kept.PatientID = kept.PatientName = keyed_hash(secret, "patient", patient)
    kept.PatientIdentityRemoved = "YES"
    kept.DeidentificationMethod = METHOD
    kept.DeidentificationMethodCodeSequence = _method_codes(is_blanked)
    kept.BurnedInAnnotation = "YES" if is_flagged else "NO"
    kept.LongitudinalTemporalInformationModified = "MODIFIED"
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kept.SOPClassUID, kept.SOPInstanceUID
    meta.TransferSyntaxUID = ds.file_meta.TransferSyntaxUID
    kept.file_meta, kept.preamble = meta, bytes(128)
    return kept


def _clean(ds: Dataset, secret: str, shift_days: int) -> None:
    actions = _actions()
    for tag in list(ds.keys()):
        try:
            element = ds[tag]
        except Exception:  # A damaged value is nobody's; pydicom raises what it likes on one.
            del ds[tag]
            continue
        action = actions.get((tag.group, tag.element), "")
        if element.keyword in _SHIFTED:
            element.value = _shifted(str(element.value or ""), shift_days)
        elif element.VR == "UI" and (action or element.keyword in _KEPT):
            values = element.value if element.VM > 1 else [element.value]
            new = [_new_uid(str(value), secret) for value in values if value]
            element.value = new if len(new) > 1 else "".join(new)
        elif element.keyword in _KEPT and not tag.is_private and action != "X_TAGS":
            if element.VR == "SQ":
                for item in element.value:
                    _clean(item, secret, shift_days)
            elif element.VR not in _NUMBERS and not _says_a_term(element):
                element.value = None
        elif element.keyword in _TIMES:
            continue
        elif action.startswith(("Z", "D", "X_Z", "X_D")) and not tag.is_private and element.VR != "SQ":
            # Emptied, which Z allows and readers of type 1 attributes bear: of these a film has none.
            ds[tag] = type(element)(tag, element.VR, None)
        else:
            del ds[tag]


def _says_a_term(element: DataElement) -> bool:
    values = [str(value).strip() for value in (element.value if element.VM > 1 else [element.value])]
    known = (value.replace(" ", "_") in _TERMS for value in values)
    return all(known) or (element.keyword == "ViewPosition" and known_view(values[0]) != "")


@functools.cache
def _actions() -> dict[tuple[int, int], str]:
    """Attribute -> its action in the profile's table, by the library's names: "X_TAGS" remove, "Z_TAGS" empty, "U_TAGS" new UID, ..."""
    from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector

    table = dicom_anonymization_database_selector(_TABLE)
    return {tuple(tag): action for action, tags in table.items() if action != "ALL_TAGS" for tag in tags if len(tag) == 2}


def _new_uid(uid: str, secret: str) -> str:
    """Classes and syntaxes of the standard stay; an instance's UID becomes a keyed one (PS3.5 B.2)."""
    return uid if uid.startswith("1.2.840.10008.") else f"2.25.{int(keyed_hash(secret, 'uid', uid), 16)}"


def _shift_days(secret: str, patient: str) -> int:
    return 1 + int(keyed_hash(secret, "date", patient), 16) % _MAX_SHIFT_DAYS


def _shifted(value: str, days: int) -> str:
    """A DA or DT value, some days earlier; "" where it is none."""
    try:
        date = datetime.datetime.strptime(value[:8], "%Y%m%d") - datetime.timedelta(days=days)
    except (ValueError, OverflowError):
        return ""
    time = value[8:]
    return date.strftime("%Y%m%d") + (time if all(character in "0123456789.+-" for character in time) else "")


def _method_codes(is_blanked: bool) -> list[Dataset]:
    """PS3.16 CID 7050."""
    from pydicom import Dataset

    codes = {
        "113100": "Basic Application Confidentiality Profile",
        "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
    }
    if is_blanked:
        codes["113101"] = "Clean Pixel Data Option"
    items = []
    for value, meaning in codes.items():
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
        items.append(item)
    return items


def _blank(ds: Dataset) -> bool:
    """Blank burned-in text in the stored pixels; false where none is found in them as they are stored."""
    import pydicom

    shown, _ = render(ds, 8)
    boxes = text_boxes(shown)
    if not boxes:
        return False
    stored: Any = blanked(stored_values(ds), boxes)
    if stored.ndim != 2:
        return False
    ds.PixelData = np.ascontiguousarray(stored).tobytes()
    ds.BitsAllocated = stored.dtype.itemsize * 8
    ds.HighBit = int(ds.BitsStored) - 1
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    return True
