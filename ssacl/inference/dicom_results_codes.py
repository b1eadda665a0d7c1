"""Coded names of findings and anatomy in DICOM results: SNOMED CT and DICOM where a code means the same, else the project's own scheme.

Source: PS3.16 context groups 4, 6102 and 6105, as carried by pydicom; a test compares every code with them.
"""

from __future__ import annotations

import re

from ssacl.anatomy import FINDINGS, NODES

SCHEME = "99SSACL"
"""Designator of the project's own codes: a CheXpert finding is often wider than any one concept of SNOMED CT."""

CodeTriple = tuple[str, str, str]
"""Value, scheme designator, meaning."""

_FINDINGS: dict[str, CodeTriple] = {
    "Edema": ("19242006", "SCT", "Pulmonary edema"),
    "Lung Opacity": ("112001", "DCM", "Opacity"),
    "Pleural Effusion": ("60046008", "SCT", "Pleural effusion"),
    "Pneumothorax": ("36118008", "SCT", "Pneumothorax"),
}
_PLACES: dict[str, CodeTriple] = {
    "chest": ("816094009", "SCT", "Chest"),
    "abdomen": ("818981001", "SCT", "Abdomen"),
    "mediastinum": ("72410000", "SCT", "Mediastinum"),
    "lungs": ("39607008", "SCT", "Lung"),
    "lung": ("39607008", "SCT", "Lung"),
    "hilar structures": ("46750007", "SCT", "Hilum of lung"),
    "apical zone": ("86598002", "SCT", "Apex of Lung"),
    "trachea": ("44567001", "SCT", "Trachea"),
    "aortic arch": ("57034009", "SCT", "Aortic arch"),
    "superior vena cava": ("48345005", "SCT", "Superior vena cava"),
    "cardiac silhouette": ("80891009", "SCT", "Heart"),
    "carina": ("28700002", "SCT", "Carina"),
    "right atrium": ("73829009", "SCT", "Right atrium"),
    "spine": ("421060004", "SCT", "Spine"),
    "clavicle": ("51299004", "SCT", "Clavicle"),
}
_SIDES: dict[str, CodeTriple] = {"right": ("24028007", "SCT", "Right"), "left": ("7771000", "SCT", "Left")}


def finding_code(finding: str) -> CodeTriple:
    """The code of one of the 14 findings."""
    return _FINDINGS.get(finding) or _own(finding)


def place_code(node: str) -> tuple[CodeTriple, CodeTriple | None]:
    """The code of an anatomy node, and of its side where it has one."""
    if node in _PLACES:
        return _PLACES[node], None
    side, _, part = node.partition(" ")
    if side not in _SIDES:
        return _own(node), None
    return _PLACES.get(part) or _own(part), _SIDES[side]


def standard_codes() -> list[CodeTriple]:
    """Every code that is not the project's own, for comparison with the standard's."""
    used = [finding_code(finding) for finding in FINDINGS]
    used += [code for node in NODES for code in place_code(node) if code]
    return [code for code in dict.fromkeys(used) if code[1] != SCHEME]


def own_code(meaning: str) -> CodeTriple:
    """A code of the project's own scheme."""
    return _own(meaning)


def _own(meaning: str) -> CodeTriple:
    return re.sub(r"\W+", "_", meaning.upper())[:16], SCHEME, meaning
