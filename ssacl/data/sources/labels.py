"""Names of splits and findings in the words of the sources."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ssacl.anatomy import FINDINGS, NO_FINDING, FindingStatus
from ssacl.data.records import SPLITS
from ssacl.errors import DataError

_SPLIT_NAMES = {name: name for name in SPLITS} | {
    "training": "train",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "testing": "test",
}
_FINDING_NAMES = {name.lower(): name for name in FINDINGS} | {
    # NIH ChestX-ray14's and everyday names of the same things.
    "effusion": "Pleural Effusion",
    "infiltration": "Lung Opacity",
    "opacity": "Lung Opacity",
    "mass": "Lung Lesion",
    "nodule": "Lung Lesion",
    "pleural thickening": "Pleural Other",
    "normal": NO_FINDING,
}
_CHEXPERT = {1.0: FindingStatus.PRESENT, 0.0: FindingStatus.ABSENT, -1.0: FindingStatus.UNCERTAIN}


def split_name(text: str) -> str:
    """The split that a source's word means, "" where it is none of them."""
    return _SPLIT_NAMES.get(text.strip().lower(), "")


def checked_split(text: str) -> str:
    """The split that a source's word means, "" for an empty one.

    Raises
    ------
    DataError
        Another word.
    """
    split = split_name(text)
    if text.strip() and not split:
        raise DataError(f"The split column holds '{text.strip()[:20]}'; expected train, val or test. Correct it, or leave the split out.")
    return split


def finding_labels(text: str) -> dict[str, int]:
    """Finding -> FindingStatus from a list of names separated by ; | or , such as "Effusion|Pneumonia".

    Named findings are present; of the others nothing is known, unless the list is "No Finding": then all but devices are absent.
    Names outside the 14 findings and their synonyms are left out.
    """
    present = {_FINDING_NAMES[name] for name in _label_names(text) if name in _FINDING_NAMES}
    if present == {NO_FINDING}:
        absent = dict.fromkeys((name for name in FINDINGS if name != "Support Devices"), int(FindingStatus.ABSENT))
        return absent | {NO_FINDING: int(FindingStatus.PRESENT)}
    labels = dict.fromkeys(sorted(present - {NO_FINDING}), int(FindingStatus.PRESENT))
    return labels | {NO_FINDING: int(FindingStatus.ABSENT)} if labels else {}


def has_unknown_label(text: str) -> bool:
    """Whether a list of labels names something outside the 14 findings."""
    return any(name not in _FINDING_NAMES for name in _label_names(text))


def chexpert_labels(row: Mapping[str, str]) -> dict[str, int]:
    """Finding -> FindingStatus from a row of a CheXpert or NegBio table: 1 present, 0 absent, -1 uncertain, empty unmentioned."""
    labels = {}
    for finding in FINDINGS:
        try:
            status = _CHEXPERT.get(float(row.get(finding) or "nan"))
        except ValueError:
            continue
        if status is not None:
            labels[finding] = int(status)
    return labels


def _label_names(text: str) -> list[str]:
    """The names in a list of labels, in lower case, "_" as a space."""
    names = (re.sub(r"[\s_]+", " ", name).strip().lower() for name in re.split(r"[;|,]", text))
    return [name for name in names if name]
