"""What a DICOM header says is on the film: chest or not, and from which side."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ssacl.data.refusals import RefusedImageError

if TYPE_CHECKING:
    from pydicom import Dataset

_RADIOGRAPHY = {"CR", "DX", "DR", "RG", "OT", "XR", ""}
_CHEST = re.compile(r"CHEST|THORAX|TORAX|LUNG|PULMO|RIB|HEART|STERN|CLAV")
_OTHER_PART = re.compile(
    r"ABD|BREAST|SKULL|HEAD|BRAIN|NECK|SPINE|PELVIS|HIP|FEMUR|KNEE|LEG|ANKLE|FOOT|TOE|SHOULDER|HUMER|ELBOW|ARM|WRIST|HAND|FINGER|JAW"
    r"|SINUS|TIBIA|EXTREM"
)
_OBLIQUE_VIEWS = {"LLO", "RLO", "LAO", "RAO", "LPO", "RPO", "OBLIQUE", "SWIMMERS"}
_LATERAL_VIEWS = {"LL", "RL", "LAT", "LLAT", "RLAT", "L", "R"} | _OBLIQUE_VIEWS
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
_VIEW_TERMS = re.compile(
    r"(?:PA|AP)(?: (?:SUPINE|ERECT|AXIAL|LLD|RLD))?|LL|RL|RLD|LLD|LAT|LLAT|RLAT|L|R|(?:LEFT |RIGHT |XTABLE )?LATERAL|FRONTAL|"
    + "|".join(sorted(_OBLIQUE_VIEWS))
)
_DESCRIPTIONS = ("SeriesDescription", "ProtocolName", "AcquisitionDeviceProcessingDescription", "PerformedProcedureStepDescription")


def is_lateral(view: str) -> bool:
    """Whether a view position is a lateral one."""
    return view in _LATERAL_VIEWS or "LATERAL" in view


def known_view(text: str) -> str:
    """The view position that `text` names, upper-case; "" for free text, which might identify someone."""
    view = text.strip().upper()
    return view if _VIEW_TERMS.fullmatch(view) else ""


def check_subject(ds: Dataset, keep_lateral: bool) -> str:
    """The view position, if this is one radiograph of a human chest, and frontal unless lateral ones are kept.

    Raises
    ------
    RefusedImageError
        multi_frame, not_radiography, lateral, not_chest or not_human.
    """
    if int(ds.get("NumberOfFrames") or 1) > 1:
        raise RefusedImageError("multi_frame")
    if text_value(ds, "Modality") not in _RADIOGRAPHY:
        raise RefusedImageError("not_radiography")
    descriptions = " | ".join(text_value(ds, keyword) for keyword in _DESCRIPTIONS).replace("_", " ")
    view = _view(ds, descriptions)
    if is_lateral(view) and not keep_lateral:
        raise RefusedImageError("lateral")
    part = text_value(ds, "BodyPartExamined")
    if _OTHER_PART.search(part) and not _CHEST.search(part):
        raise RefusedImageError("not_chest")
    if ("PatientSpeciesDescription" in ds and "HUMAN" not in text_value(ds, "PatientSpeciesDescription")) or _ANIMAL_WORD.search(
        descriptions
    ):
        raise RefusedImageError("not_human")
    return view


def _view(ds: Dataset, descriptions: str) -> str:
    view = text_value(ds, "ViewPosition")
    if view:
        return known_view(view)
    for code in ds.get("ViewCodeSequence") or ():
        known = _VIEW_CODES.get(text_value(code, "CodeValue"))
        if known:
            return known
    rows_run_to = str(_first(ds.get("PatientOrientation")) or "")[:1]
    if rows_run_to in {"A", "P"}:
        return "LATERAL"
    if _FRONTAL_WORD.search(descriptions):
        return ""
    return "LATERAL" if _LATERAL_WORD.search(descriptions) else ""


def text_value(ds: Dataset, keyword: str) -> str:
    """The first value of an attribute as upper-case text, "" where there is none."""
    value = _first(ds.get(keyword))
    return str(value).strip().upper() if value is not None else ""


def _first(value: Any) -> Any:
    if value is None or isinstance(value, str | bytes):
        return value
    try:
        return next(iter(value), None)
    except TypeError:
        return value
