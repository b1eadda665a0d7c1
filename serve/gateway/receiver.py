"""The listening side: C-ECHO and C-STORE (PS3.4 annex B), an instance on disk before Success is answered."""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydicom import Dataset
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined, unused-ignore]
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from serve.gateway.config import GatewayConfig
from serve.gateway.intake import CANNOT_UNDERSTAND, SUCCESS, SYNTAXES, Intake, Taken
from serve.gateway.routing import Caller, TurnedAway
from serve.gateway.tls import server_context
from ssacl.data.quiet import quiet_loggers
from ssacl.errors import ServeError

if TYPE_CHECKING:
    from pynetdicom.events import Event

logger = logging.getLogger(__name__)
_HANDSHAKE_S = 10.0
_SPARE_BYTES = 1 << 20
"""Of an association, beside the instance: PDU headers and commands."""


class Receiver:
    """The DICOM node. `turned_away` is told of each caller that is not let in."""

    def __init__(self, config: GatewayConfig, intake: Intake, turned_away: TurnedAway) -> None:
        quiet_loggers("pydicom", "pynetdicom")
        self._config, self._intake, self._turned_away = config, intake, turned_away
        self._ae = ae = AE(config.ae_title)
        ae.require_called_aet = True
        ae.require_calling_aet = list(config.calling_ae)
        ae.maximum_associations = config.limits.max_associations
        ae.network_timeout = ae.dimse_timeout = config.limits.network_timeout_s
        ae.acse_timeout = min(10.0, config.limits.network_timeout_s)
        ae.add_supported_context(Verification)
        for sop_class in intake.sop_classes:
            ae.add_supported_context(sop_class, list(SYNTAXES))
        self._server: _Server | None = None

    def start(self) -> int:
        """Listen; returns the port.

        Raises
        ------
        ServeError
            The address is taken or not of this machine.
        ConfigError
            A TLS file cannot be used.
        """
        handlers: list[Any] = [(evt.EVT_C_STORE, self._store), (evt.EVT_C_ECHO, self._echo), (evt.EVT_REJECTED, self._rejected)]
        tls = server_context(self._config.tls) if self._config.tls else None
        limits, address = self._config.limits, (self._config.host, self._config.port)
        try:
            self._server = self._ae.make_server(
                address,
                evt_handlers=handlers,
                server_class=_Server,
                request_handler=_bounded_handler(limits.max_instance_bytes + _SPARE_BYTES),
            )
        except OSError as error:
            raise ServeError(f"Cannot listen on {address[0]}:{address[1]}. Choose another host or port in the configuration.") from error
        self._server.tls, self._server.timeout_s, self._server.turned_away = tls, limits.network_timeout_s, self._turned_away
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="ssacl-receiver", daemon=True).start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Take no more; associations are aborted, and callers send again what was not answered."""
        if self._server is not None:
            for association in self._server.active_associations:
                association.abort()
            self._server.shutdown()

    def _echo(self, event: Event) -> int:
        return SUCCESS

    def _rejected(self, event: Event) -> None:
        caller = _caller(event)
        logger.warning("an association was rejected: calling or called AE title not accepted, or too many at once")
        self._turned_away("association", caller)

    def _store(self, event: Event) -> Dataset:
        getattr(event.assoc, "meter", _NO_METER).reset()
        announced = (event.request.AffectedSOPClassUID, event.request.AffectedSOPInstanceUID)
        try:
            content = event.encoded_dataset()
        # Before anything of it could be read.
        except Exception as error:
            logger.error("an instance cannot be read: %s", type(error).__name__)
            return _status(Taken(CANNOT_UNDERSTAND, "data set cannot be read"))
        return _status(self._intake.take(content, _caller(event), lambda ds: (ds.SOPClassUID, ds.SOPInstanceUID) == announced))


class _Server(ThreadedAssociationServer):
    """Gives every connection a time limit, and makes the TLS handshake in the connection's own thread: a silent caller holds up nobody."""

    tls: ssl.SSLContext | None = None
    timeout_s = 60.0
    turned_away: TurnedAway

    def shutdown(self) -> None:
        # pynetdicom's own strikes the server off a list that only its other way of starting one puts it on.
        socketserver.BaseServer.shutdown(self)
        self.server_close()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(_HANDSHAKE_S)
            request = self.tls.wrap_socket(request, server_side=True) if self.tls else request
            request.settimeout(self.timeout_s)
        except OSError:
            logger.warning("a connection was refused: no TLS, or no certificate that is accepted")
            self.turned_away("tls", Caller("", "c-store", str(client_address[0])))
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
            request.close()
            return
        super().process_request_thread(request, client_address)


class _Meter:
    """Ends an association that sends more between two instances than one may have."""

    def __init__(self, receive: Callable[[int], bytearray], limit: int) -> None:
        self._receive, self._limit, self._num_bytes = receive, limit, 0

    def __call__(self, num_bytes: int) -> bytearray:
        self._num_bytes += num_bytes
        if self._num_bytes > self._limit:
            logger.warning("an association was ended: more bytes than an instance may have")
            raise OSError(f"more than {self._limit} bytes")
        return self._receive(num_bytes)

    def reset(self) -> None:
        self._num_bytes = 0


_NO_METER = _Meter(lambda _: bytearray(), 0)


def _bounded_handler(limit: int) -> type[RequestHandler]:
    class BoundedHandler(RequestHandler):
        def _create_association(self) -> Association:
            association = super()._create_association()
            # pynetdicom reads as many bytes as a PDU announces, and as many PDUs as come, into memory.
            wire: Any = association.dul.socket
            wire.recv = association.meter = _Meter(wire.recv, limit)
            return association

    return BoundedHandler


def _caller(event: Event) -> Caller:
    requestor = event.assoc.requestor
    return Caller(str(requestor.ae_title).strip(), "c-store", str(requestor.address or ""))


def _status(taken: Taken) -> Dataset:
    ds = Dataset()
    ds.Status = taken.status
    if taken.status != SUCCESS:
        ds.ErrorComment = taken.comment[:64]
    return ds
