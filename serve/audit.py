"""The audit log: who did what, when, how it ended, as FHIR R4B AuditEvents, one JSON object a line. No patient data, no credentials."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from ssacl.errors import ConfigError

_ACTIONS: dict[str, Literal["C", "R", "U", "D"]] = {"POST": "C", "GET": "R", "HEAD": "R", "PUT": "U", "DELETE": "D"}
REST = ("http://terminology.hl7.org/CodeSystem/audit-event-type", "rest")
_DICOM = "http://dicom.nema.org/resources/ontology/DCM"
INSTANCES_TRANSFERRED, SECURITY_ALERT = (_DICOM, "110104"), (_DICOM, "110113")
"""PS3.15 section A.5.3."""
_AGENTS = "http://terminology.hl7.org/CodeSystem/v3-RoleClassRelational"


@dataclass(frozen=True)
class Event:
    """One request, or one instance that was handed in."""

    client: str
    """Name of the client; "" where it is not known."""
    address: str
    operation: str
    action: Literal["C", "R", "U", "D", "E"]
    outcome: Literal["0", "4", "8"]
    """Success, the client's failure, ours."""
    told: str
    """Status of the answer."""
    request_id: str
    objects: tuple[str, ...] = ()
    """Hashes of what was read or made."""
    kind: tuple[str, str] = REST
    """Coding system and code."""

    @classmethod
    def of_request(
        cls, client: str, address: str, operation: str, method: str, status: int, request_id: str, objects: tuple[str, ...]
    ) -> Event:
        """Of an HTTP request and the status that answers it."""
        outcome: Literal["0", "4", "8"] = "0" if status < 400 else "4" if status < 500 else "8"
        return cls(client, address, operation, _ACTIONS.get(method, "E"), outcome, str(status), request_id, objects)


class AuditLog:
    """An append-only file. A record is on the disk when `record` returns.

    Raises
    ------
    ConfigError
        The file cannot be opened for appending.
    """

    def __init__(self, path: Path) -> None:
        from fhir.resources.R4B.auditevent import AuditEvent

        self._resource = AuditEvent
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"The audit file {path} cannot be written. Give a file that this user may append to.") from error
        self._guard = threading.Lock()

    def record(self, event: Event) -> None:
        """Append a record.

        Raises
        ------
        OSError
            The disk refuses; what was asked for must then not be answered.
        """
        line = (self._resource.model_validate(_tree(event)).model_dump_json() + "\n").encode()
        with self._guard:
            # One write: other processes that append to the same file cannot come between.
            if os.write(self._file, line) != len(line):
                raise OSError("audit record cut off")
            os.fsync(self._file)


def _tree(event: Event) -> dict[str, object]:
    return {
        "resourceType": "AuditEvent",
        "type": {"system": event.kind[0], "code": event.kind[1]},
        "subtype": [{"system": "urn:ssacl:operation", "code": event.operation}],
        "action": event.action,
        "recorded": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "outcome": event.outcome,
        "outcomeDesc": event.told,
        "agent": [
            {
                "type": {"coding": [{"system": _AGENTS, "code": "AGNT"}]},
                "who": {"identifier": {"system": "urn:ssacl:client", "value": event.client or "unknown"}},
                "requestor": True,
                "network": {"address": event.address or "unknown", "type": "2"},
            }
        ],
        "source": {"observer": {"display": "ssacl"}},
        "entity": [
            {"what": {"identifier": {"system": "urn:ssacl:request", "value": event.request_id}}},
            *({"what": {"identifier": {"system": "urn:ssacl:hash", "value": value}}} for value in event.objects),
        ],
    }
