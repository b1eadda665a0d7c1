"""Keyed hashes instead of identifiers, and report text without the header's own values. DICOM files: `deidentify_dicom.py`.

Pictures need no scrubbing here: a shard sample holds an allowlist of fields (`ssacl.data.records.Sample`), never a header.
"""

from __future__ import annotations

import calendar
import hashlib
import hmac
import io
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssacl.data.dicom_guard import MAX_INFLATED_BYTES, inflates_beyond, is_dicom
from ssacl.data.quiet import quiet_loggers
from ssacl.errors import ConfigError

MARK = "___"
_KEYED_CHARACTERS = 24
_IDS = (
    "PatientID",
    "OtherPatientIDs",
    "AccessionNumber",
    "StudyID",
    "InstitutionName",
    "InstitutionAddress",
    "StationName",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "RequestedProcedureID",
    "OtherPatientNames",
    "IssuerOfPatientID",
    "FillerOrderNumberImagingServiceRequest",
    "PlacerOrderNumberImagingServiceRequest",
    "PerformedProcedureStepID",
    "ScheduledProcedureStepID",
    "InstitutionalDepartmentName",
    "DeviceSerialNumber",
    "MedicalRecordLocator",
    "MilitaryRank",
    "InsurancePlanIdentification",
    "CountryOfResidence",
    "RegionOfResidence",
    "AdmissionID",
    "ServiceEpisodeID",
    "CurrentPatientLocation",
)
_PRIVATE_VRS = {"AE", "CS", "IS", "LO", "LT", "SH", "ST", "UC", "UI", "UR", "UT"}
_CODE = re.compile(r"(?=.*\d)\S{6,64}")
_MAX_HEAD_BYTES = 16 << 20


def keyed_hash(secret: str, kind: str, value: str) -> str:
    """24 hex digits (96 bits) that stand for `value`; the same within a project, not to be undone without the secret."""
    return hmac.new(secret.encode(), f"{kind}:{value}".encode(), hashlib.sha256).hexdigest()[:_KEYED_CHARACTERS]


def key_secret(key_file: Path | None = None) -> str:
    """The project's secret: SSACL_KEY_SECRET, else the content of a private key file, made at first use.

    Parameters
    ----------
    key_file
        None: `ssacl/key_secret` in the user's configuration folder.

    Raises
    ------
    ConfigError
        The variable is too short, or the file cannot be made or read.
    """
    given = os.environ.get("SSACL_KEY_SECRET", "")
    if given:
        return checked_secret(given)
    path = key_file or Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "ssacl" / "key_secret"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
            try:
                # Linking fails where another process was first: then its secret is the one.
                os.link(temporary, path)
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        return checked_secret(path.read_text(encoding="ascii").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read or make the key file {path}. Set SSACL_KEY_SECRET instead.") from error


def checked_secret(secret: str) -> str:
    """`secret`, if it cannot be guessed.

    Raises
    ------
    ConfigError
        Shorter than 16 characters.
    """
    if len(secret) < 16:
        raise ConfigError("The key secret (SSACL_KEY_SECRET) has fewer than 16 characters; make one with: openssl rand -hex 32")
    return secret


def patient_id_in(head: bytes) -> str:
    """PatientID in the first bytes of a DICOM file; "" where there is none or it cannot be read. Never to be stored: hash it."""
    if not is_dicom(head) or inflates_beyond(head, _MAX_HEAD_BYTES):
        return ""
    from pydicom.filereader import read_partial

    with quietly():
        try:
            # Later elements may be cut off: they are not looked at.
            ds = read_partial(io.BytesIO(head), stop_when=lambda tag, vr, length: tag > 0x00100020, force=True)
            return _text(ds.get("PatientID"))
        except Exception:  # A damaged header identifies nobody; the picture reader names the damage.
            return ""


def identifiers_in(content: bytes) -> frozenset[str]:
    """What a DICOM header holds that may stand in a report: names of people at any depth, ids, places, dates. Empty for other files."""
    if not is_dicom(content) or inflates_beyond(content, MAX_INFLATED_BYTES):
        return frozenset()
    import pydicom

    found: set[str] = set()

    def collect(ds: Any, element: Any) -> None:
        if element.VR == "SQ" or element.is_empty:
            return
        values = element.value if element.VM > 1 else [element.value]
        if element.VR == "PN":
            for value in values:
                found.update([str(value), *re.split(r"[\^=\s,]+", str(value))])
        elif element.VR == "DA":
            for value in values:
                found.update(_written_dates(str(value)))
        elif element.keyword in _IDS or (element.VR == "UI" and element.keyword.endswith("InstanceUID")):
            found.update(map(_text, values))
        elif element.tag.is_private and element.VR in _PRIVATE_VRS:
            # Nobody knows what they mean. Words are left: they may be a report's, too.
            found.update(text for text in map(_text, values) if _CODE.fullmatch(text))

    with quietly():
        try:
            pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, force=True).walk(collect)
        except Exception:  # The picture was read: what cannot be is a damaged element, and those before it have been collected.
            return frozenset(found - {""})
    return frozenset(found - {""})


def scrub(text: str, identifiers: Iterable[str]) -> str:
    """`text` with every whole-word occurrence of an identifier replaced by "___".

    Identifiers under 3 characters, or numbers under 4 digits, are left: they are ordinary words and figures of a report.
    """
    kept = sorted({value for value in identifiers if len(value) >= (4 if value.isdigit() else 3)}, key=lambda value: (-len(value), value))
    if not text or not kept:
        return text
    pattern = "|".join(re.escape(value) for value in kept)
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", MARK, text, flags=re.IGNORECASE)


def _written_dates(value: str) -> set[str]:
    """A DICOM date as reports write it."""
    match = re.fullmatch(r"(\d{4})(\d\d)(\d\d)", value)
    if not match or not 1 <= int(match.group(2)) <= 12:
        return set()
    year, month, day = match.groups()
    name = calendar.month_name[int(month)]
    written = {
        value,
        f"{name} {int(day)}, {year}",
        f"{int(day)} {name} {year}",
        f"{name[:3]} {int(day)}, {year}",
        f"{int(day)} {name[:3]} {year}",
    }
    for parts in ((year, month, day), (month, day, year), (day, month, year)):
        for mark in "-/.":
            written |= {mark.join(parts), mark.join(str(int(part)) for part in parts)}
    return written


@contextmanager
def quietly() -> Iterator[None]:
    """pydicom, neither checking values nor quoting them."""
    import pydicom

    quiet_loggers("pydicom")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
