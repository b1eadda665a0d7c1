"""Keyed hashes instead of identifiers, and report text without the header's own values.

Pictures need no scrubbing here: a shard sample holds an allowlist of fields (`ssacl.data.records.Sample`), never a header.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import re
import secrets
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from ssacl.errors import ConfigError

MARK = "___"
_KEYED_CHARACTERS = 24
_NAMES = (
    "PatientName",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "RequestingPhysician",
    "OperatorsName",
    "NameOfPhysiciansReadingStudy",
)
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
)


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


def patient_id_of(path: Path) -> str:
    """PatientID of a DICOM file, "" where there is none or the file cannot be read. Never to be stored: hash it."""
    try:
        with path.open("rb") as file:
            return _text(_header(file, ("PatientID",)).get("PatientID"))
    except OSError:
        return ""


def identifiers_in(content: bytes) -> frozenset[str]:
    """Values of a DICOM header that may stand in a report: names, ids, institution. Empty for other files."""
    if content[128:132] != b"DICM":
        return frozenset()
    header = _header(io.BytesIO(content), (*_NAMES, *_IDS))
    found: set[str] = set()
    for keyword, value in header.items():
        for item in value if isinstance(value, list | tuple) or type(value).__name__ == "MultiValue" else [value]:
            text = _text(item)
            found.add(text)
            if keyword in _NAMES:
                found.update(re.split(r"[\^=\s,]+", text))
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


def _header(file: BinaryIO, keywords: tuple[str, ...]) -> dict[str, Any]:
    import pydicom

    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*keywords], force=True)
            return {keyword: ds.get(keyword) for keyword in keywords if ds.get(keyword) is not None}
    except Exception:  # A damaged header identifies nobody; the picture reader names the damage.
        return {}


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()
