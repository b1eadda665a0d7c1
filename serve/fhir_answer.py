"""The draft as a FHIR bundle (R4B or R5): a preliminary DiagnosticReport, an Observation for each finding, and the software as Device.

The bundle holds no patient: who it is of is known to the client, and a draft that nobody has verified must not enter a record by itself.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import ssacl
from serve.negotiation import FhirVersion
from ssacl.inference.report import DraftReport, Finding

_LOINC, _V2_SECTION = "http://loinc.org", "http://terminology.hl7.org/CodeSystem/v2-0074"
_PERCENT = {"unit": "%", "system": "http://unitsofmeasure.org", "code": "%"}


def fhir_answer(report: DraftReport, request_id: str, version: FhirVersion) -> bytes:
    """The bundle as JSON, validated against its release.

    Parameters
    ----------
    report
        The draft.
    request_id
        What entries are named by.
    version
        "4.3" (R4B) or "5.0" (R5).
    """
    if version == "5.0":
        from fhir.resources.bundle import Bundle
    else:
        from fhir.resources.R4B.bundle import Bundle  # type: ignore[assignment]
    return Bundle.model_validate(_bundle(report, request_id, version)).model_dump_json().encode()


def _bundle(report: DraftReport, request_id: str, version: FhirVersion) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    device = f"urn:uuid:{uuid5(NAMESPACE_URL, f'{request_id}/device')}"
    resources = [
        (f"urn:uuid:{uuid5(NAMESPACE_URL, f'{request_id}/{item.name}')}", _observation(item, device, now)) for item in report.findings
    ]
    draft = {
        "resourceType": "DiagnosticReport",
        "status": "preliminary",
        "category": [{"coding": [{"system": _V2_SECTION, "code": "RAD", "display": "Radiology"}]}],
        "code": {
            "coding": [{"system": _LOINC, "code": "18748-4", "display": "Diagnostic imaging study"}],
            "text": "Chest X-ray, draft report",
        },
        "identifier": [
            {"system": "urn:ssacl:request", "value": request_id},
            {"system": "urn:ssacl:image", "value": report.image_ref},
        ],
        "issued": now,
        "performer": [{"reference": device}],
        "result": [{"reference": address} for address, _ in resources],
        "conclusion": f"{report.text}\n\n{report.disclaimer}" if report.text else report.disclaimer,
        "presentedForm": [
            {
                "contentType": "text/plain; charset=utf-8",
                "title": "Draft report",
                "data": base64.b64encode(f"{report.text}\n\n{report.disclaimer}\n".encode()).decode(),
            }
        ],
    }
    made_by = _device(report, version)
    entries = [(f"urn:uuid:{uuid5(NAMESPACE_URL, f'{request_id}/report')}", draft), *resources, (device, made_by)]
    return {
        "resourceType": "Bundle",
        "type": "collection",
        "timestamp": now,
        "entry": [{"fullUrl": address, "resource": resource} for address, resource in entries],
    }


def _observation(finding: Finding, device: str, now: str) -> dict[str, Any]:
    return {
        "resourceType": "Observation",
        "status": "preliminary",
        "code": {"coding": [{"system": "urn:ssacl:finding", "code": finding.name}], "text": finding.name},
        "issued": now,
        "device": {"reference": device},
        "valueBoolean": finding.present,
        "component": [
            {"code": {"text": "probability"}, "valueQuantity": {"value": round(100 * finding.probability, 2), **_PERCENT}},
            {"code": {"text": "threshold"}, "valueQuantity": {"value": round(100 * finding.threshold, 2), **_PERCENT}},
        ],
    }


def _device(report: DraftReport, version: FhirVersion) -> dict[str, Any]:
    name = f"ssacl {ssacl.__version__}"
    named = (
        {"name": [{"value": name, "type": "user-friendly-name"}]}
        if version == "5.0"
        else {"deviceName": [{"name": name, "type": "user-friendly-name"}]}
    )
    return {
        "resourceType": "Device",
        "version": [{"value": report.model_version}],
        "note": [{"text": report.disclaimer}],
        **named,
    }
