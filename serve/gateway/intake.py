"""What both listening sides do with an instance: read its header, decide by the rules, and have it on the disk before they answer."""

from __future__ import annotations

import io
import logging
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import pydicom
from pydicom import Dataset, uid

from serve.audit import INSTANCES_TRANSFERRED, AuditLog, Event
from serve.gateway.config import GatewayConfig
from serve.gateway.metrics import GatewayMetrics
from serve.gateway.outcomes import SpoolFullError
from serve.gateway.routing import OWN_RESULT, Caller, decide
from serve.gateway.spool import Spool, key_of
from ssacl.data.dicom_guard import file_meta
from ssacl.data.quiet import quiet_loggers

logger = logging.getLogger(__name__)
FILMS = (
    uid.ComputedRadiographyImageStorage,
    uid.DigitalXRayImageStorageForPresentation,
    uid.DigitalXRayImageStorageForProcessing,
)
SYNTAXES = (
    uid.ExplicitVRLittleEndian,
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.JPEGLossless,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEGLSNearLossless,
    uid.JPEG2000Lossless,
    uid.JPEG2000,
    uid.HTJ2KLossless,
    uid.HTJ2K,
    uid.RLELossless,
)
"""No deflated data sets: nobody compresses films so, and their size is unknown before they are unpacked."""
SUCCESS, OUT_OF_RESOURCES, MISMATCH, CANNOT_UNDERSTAND, FAILURE = 0x0000, 0xA700, 0xA900, 0xC000, 0x0110
CLASS_NOT_SUPPORTED, NOT_AUTHORIZED, SYNTAX_NOT_SUPPORTED = 0x0122, 0x0124, 0xC122
"""C-STORE statuses (PS3.4 table B.2-1, PS3.7 annex C), which are STOW-RS's failure reasons too (PS3.18 table I.2-2)."""

_UID = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True)
class Taken:
    """How an instance is answered."""

    status: int
    comment: str = ""
    """Fixed words, or those of a rule; never a header value."""
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    """Both empty where they cannot be read."""


class Intake:
    """`on_new` is told the key of each instance that was put in the spool."""

    def __init__(
        self, config: GatewayConfig, spool: Spool, on_new: Callable[[str], None], metrics: GatewayMetrics, audit: AuditLog | None
    ) -> None:
        quiet_loggers("pydicom")
        self._config, self._spool, self._on_new, self._metrics, self._audit = config, spool, on_new, metrics, audit
        self.sop_classes = (*FILMS, uid.SecondaryCaptureImageStorage)[: len(FILMS) + int(config.secondary_capture)]
        """That reports are made of."""

    def take(self, content: bytes, caller: Caller, is_expected: Callable[[Dataset], bool]) -> Taken:
        """Take a DICOM file; nothing that is wrong with it raises.

        Parameters
        ----------
        is_expected
            Whether the header is of what the caller announced.
        """
        request_id = uuid.uuid4().hex
        header = self._read(content)
        if isinstance(header, Taken):
            return self._told("failed", header, caller, request_id)
        outcome, status, comment = self._decided(content, caller, header, is_expected, request_id)
        return self._told(outcome, Taken(status, comment, str(header.SOPClassUID), str(header.SOPInstanceUID)), caller, request_id)

    def _read(self, content: bytes) -> Dataset | Taken:
        if len(content) > self._config.limits.max_instance_bytes:
            return Taken(OUT_OF_RESOURCES, "instance too large")
        # Before a library reads it: a deflated data set would be unpacked whole.
        if content[128:132] == b"DICM" and file_meta(content)[0] not in SYNTAXES:
            return Taken(SYNTAX_NOT_SUPPORTED, "transfer syntax not taken")
        try:
            header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
            identifiers = [str(header.get(keyword) or "") for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID")]
        except Exception:
            return Taken(CANNOT_UNDERSTAND, "data set cannot be read")
        if not all(map(_UID.fullmatch, identifiers)):
            return Taken(CANNOT_UNDERSTAND, "an identifier is missing or is none")
        return header

    def _decided(
        self, content: bytes, caller: Caller, header: Dataset, is_expected: Callable[[Dataset], bool], request_id: str
    ) -> tuple[str, int, str]:
        """Outcome, status and comment."""
        try:
            if not is_expected(header):
                return "failed", MISMATCH, "data set is not the instance announced"
            decision = decide(self._config, caller, header)
            if header.SOPClassUID not in self.sop_classes and decision.reason != OWN_RESULT:
                return "failed", CLASS_NOT_SUPPORTED, "SOP class not taken"
            if decision.action == "refuse":
                return "refused", NOT_AUTHORIZED, f"refused: {decision.reason}"
            if decision.action == "pass":
                self._spool.settle_unread(str(header.SOPInstanceUID), "passed", decision.reason)
                return "passed", SUCCESS, decision.reason
            key = self._spool.accept(content, str(header.SOPInstanceUID), caller.name, decision.destinations, request_id)
            if key is None:
                return "known", SUCCESS, "known already"
            self._on_new(key)
            return "accepted", SUCCESS, ""
        except SpoolFullError:
            return "full", OUT_OF_RESOURCES, "out of space, send again later"
        except OSError as error:
            return "full", OUT_OF_RESOURCES, f"spool cannot be written ({type(error).__name__})"
        # Whatever is wrong with an instance must not end the node; the text of an error may quote the header.
        except Exception as error:
            return "failed", FAILURE, f"internal error ({type(error).__name__})"

    def _told(self, outcome: str, taken: Taken, caller: Caller, request_id: str) -> Taken:
        """Count, log and record it; what cannot be recorded is not answered with Success."""
        names, told = (key_of(taken.sop_instance_uid),) if taken.sop_instance_uid else (), f"{outcome} {taken.status:04X}"
        if self._audit is not None:
            code: Literal["0", "4", "8"] = "0" if taken.status == SUCCESS else "8" if taken.status in (OUT_OF_RESOURCES, FAILURE) else "4"
            event = Event(caller.name, caller.address, "instance.store", "C", code, told, request_id, names, INSTANCES_TRANSFERRED)
            try:
                self._audit.record(event)
            except OSError:
                outcome, taken = "full", replace(taken, status=OUT_OF_RESOURCES, comment="cannot be recorded")
        self._metrics.received(caller.way, outcome)
        level = logging.INFO if taken.status == SUCCESS else logging.ERROR if outcome == "full" else logging.WARNING
        name, comment = names[0][:12] if names else "instance", f": {taken.comment}" if taken.comment else ""
        logger.log(level, "request %s: %s %s from %s%s", request_id, name, outcome, caller.name, comment, extra={"request_id": request_id})
        return taken
