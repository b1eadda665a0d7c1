"""Results on their way to an archive: C-STORE (pynetdicom) or STOW-RS (dicomweb-client)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE

from serve.gateway.config import CStoreDestination, Destination, StowDestination
from serve.gateway.endpoint import RESULTS
from serve.gateway.outcomes import AwayError, RefusedError
from serve.gateway.tls import client_context
from ssacl.data.quiet import quiet_loggers

if TYPE_CHECKING:
    from dicomweb_client import DICOMwebClient

logger = logging.getLogger(__name__)
_TIMEOUT_S = 60.0


class Sender(Protocol):
    """Sends instances to one destination; sending them again does no harm, their UIDs are the same."""

    def send(self, results: Sequence[Path]) -> None:
        """Raises `AwayError` or `RefusedError`."""
        ...


def open_sender(name: str, destination: Destination, ae_title: str) -> Sender:
    """
    Raises
    ------
    ConfigError
        A TLS file cannot be used.
    """
    if isinstance(destination, StowDestination):
        return StowSender(name, destination)
    return CStoreSender(name, destination, ae_title)


class CStoreSender:
    """A Storage SCU."""

    def __init__(self, name: str, destination: CStoreDestination, ae_title: str) -> None:
        quiet_loggers("pydicom", "pynetdicom")
        self._name, self._destination, self._ae_title = name, destination, ae_title
        self._tls = client_context(destination.tls) if destination.tls else None

    def send(self, results: Sequence[Path]) -> None:
        ae = AE(self._ae_title)
        ae.connection_timeout, ae.acse_timeout, ae.dimse_timeout, ae.network_timeout = 10.0, 30.0, _TIMEOUT_S, _TIMEOUT_S
        for sop_class in RESULTS:
            ae.add_requested_context(sop_class, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        to = self._destination
        association = ae.associate(to.host, to.port, ae_title=to.ae_title, tls_args=(self._tls, to.host) if self._tls else None)
        if not association.is_established:
            if association.is_rejected:
                logger.error("destination %s rejects us: let it know our AE title", self._name)
            raise AwayError(f"destination_{self._name}_away")
        try:
            for path in results:
                self._send_one(association, path)
        finally:
            if association.is_established:
                association.release()

    def _send_one(self, association: object, path: Path) -> None:
        ds = pydicom.dcmread(path)
        try:
            answer = association.send_c_store(ds)  # type: ignore[attr-defined]
        except ValueError:
            # No presentation context: it does not take such objects.
            raise RefusedError(f"destination_{self._name}_takes_no_{ds.Modality.lower()}") from None
        except RuntimeError:
            raise AwayError(f"destination_{self._name}_broke_off") from None
        status = answer.get("Status")
        if status is None or 0xA700 <= status <= 0xA7FF:
            raise AwayError(f"destination_{self._name}_{'broke_off' if status is None else 'out_of_resources'}")
        if status != 0x0000 and not 0xB000 <= status <= 0xBFFF:
            raise RefusedError(f"destination_{self._name}_status_{status:04X}")


class StowSender:
    """A STOW-RS client."""

    def __init__(self, name: str, destination: StowDestination) -> None:
        quiet_loggers("pydicom", "dicomweb_client", "urllib3")
        self._name, self._url = name, destination.url.rstrip("/")

    def send(self, results: Sequence[Path]) -> None:
        import requests

        try:
            answer = self._client().store_instances([pydicom.dcmread(path) for path in results])
        except requests.HTTPError as error:
            status = error.response.status_code
            if status in (400, 409, 413, 415, 422):
                raise RefusedError(f"destination_{self._name}_http_{status}") from None
            raise AwayError(f"destination_{self._name}_http_{status}") from None
        except requests.RequestException:
            raise AwayError(f"destination_{self._name}_away") from None
        if answer.get("FailedSOPSequence"):
            raise RefusedError(f"destination_{self._name}_failed_{int(answer.FailedSOPSequence[0].get('FailureReason', 0)):04X}")

    def _client(self) -> DICOMwebClient:
        from dicomweb_client import DICOMwebClient, session_utils

        session = session_utils.create_session()
        session.trust_env = False
        user, password, token = (os.environ.get(f"DICOMWEB_{name}", "") for name in ("USER", "PASSWORD", "TOKEN"))
        if user:
            session = session_utils.add_basic_auth_to_session(session, user, password) or session
        headers = {"Authorization": f"Bearer {token}"} if token and not user else None
        return DICOMwebClient(self._url, session=session, headers=headers)
