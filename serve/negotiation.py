"""Which form of answer a client asks for (RFC 9110 section 12.5.1), and when it wants it (RFC 7240)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from serve.problems import ProblemError

Kind = Literal["application/json", "image/png", "multipart/related", "application/fhir+json"]
FhirVersion = Literal["4.3", "5.0"]
_KINDS: dict[str, Kind] = {
    "image/png": "image/png",
    "image/*": "image/png",
    "multipart/related": "multipart/related",
    "application/dicom": "multipart/related",
    "application/fhir+json": "application/fhir+json",
    "application/json": "application/json",
    "application/*": "application/json",
    "*/*": "application/json",
    "": "application/json",
}


@dataclass(frozen=True)
class AnswerType:
    kind: Kind
    fhir_version: FhirVersion = "4.3"


def answer_type(accept: str) -> AnswerType:
    """The first acceptable type by quality; JSON where the client does not care. FHIR is R4B unless fhirVersion=5.0 is asked for.

    Raises
    ------
    ProblemError
        406: none of the types can be given.
    """
    offers: list[tuple[float, AnswerType]] = []
    for part in accept[:1000].split(","):
        name, *pieces = (piece.strip().lower() for piece in part.split(";"))
        parameters = {key.strip(): value.strip(' "') for key, _, value in (piece.partition("=") for piece in pieces)}
        kind, version, quality = _KINDS.get(name), parameters.get("fhirversion", "4.3"), parameters.get("q", "1")
        weight = float(quality) if quality.isascii() and quality.replace(".", "", 1).isdigit() else 0.0
        if weight <= 0 or kind is None:
            continue
        if kind != "application/fhir+json":
            offers.append((weight, AnswerType(kind)))
        elif version == "4.3":
            offers.append((weight, AnswerType(kind, "4.3")))
        elif version == "5.0":
            offers.append((weight, AnswerType(kind, "5.0")))
    if not offers:
        known = "application/json, image/png, application/dicom or application/fhir+json with fhirVersion 4.3 or 5.0"
        raise ProblemError(406, "accept", "No such answer type", f"Accept {known}.")
    return max(offers, key=lambda offer: offer[0])[1]


def prefers_async(prefer: str) -> bool:
    """Whether the header Prefer asks to be answered at once and served later."""
    return any(part.partition(";")[0].strip().lower() == "respond-async" for part in prefer[:1000].split(","))
