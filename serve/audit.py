"""The audit log: who did what, when, how it ended, as FHIR R4B AuditEvents, one JSON object a line. No patient data, no credentials."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ssacl.errors import ConfigError

_ACTIONS = {"POST": "C", "GET": "R", "HEAD": "R", "PUT": "U", "DELETE": "D"}
_TYPES = "http://terminology.hl7.org/CodeSystem/audit-event-type"
_AGENTS = "http://terminology.hl7.org/CodeSystem/v3-RoleClassRelational"


@dataclass(frozen=True)
class Event:
    """One request."""

    client: str
    """Name of the client; "" where it is not known."""
    address: str
    operation: str
    method: str
    status: int
    request_id: str
    objects: tuple[str, ...] = ()
    """Hashes of what was read or made."""


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
    outcome = "0" if event.status < 400 else "4" if event.status < 500 else "8"
    return {
        "resourceType": "AuditEvent",
        "type": {"system": _TYPES, "code": "rest"},
        "subtype": [{"system": "urn:ssacl:operation", "code": event.operation}],
        "action": _ACTIONS.get(event.method, "E"),
        "recorded": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "outcome": outcome,
        "outcomeDesc": str(event.status),
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
