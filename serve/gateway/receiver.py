"""The listening side: C-ECHO and C-STORE (PS3.4 annex B), an instance on disk before Success is answered."""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pydicom
from pydicom import Dataset, uid
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined, unused-ignore]
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from serve.gateway.config import GatewayConfig, ServerTls
from serve.gateway.outcomes import SpoolFullError
from serve.gateway.routing import decide
from serve.gateway.spool import Spool, key_of
from ssacl.data.quiet import quiet_loggers
from ssacl.errors import ConfigError, ServeError

if TYPE_CHECKING:
    from pynetdicom.events import Event

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
SUCCESS, OUT_OF_RESOURCES, NOT_AUTHORIZED, MISMATCH, CANNOT_UNDERSTAND, FAILURE = 0x0000, 0xA700, 0x0124, 0xA900, 0xC000, 0x0110
_HANDSHAKE_S = 10.0
_SPARE_BYTES = 1 << 20
"""Of an association, beside the instance: PDU headers and commands."""


class Receiver:
    """The DICOM node. `on_new` is told the key of each instance that was put in the spool."""

    def __init__(self, config: GatewayConfig, spool: Spool, on_new: Callable[[str], None]) -> None:
        quiet_loggers("pydicom", "pynetdicom")
        self._config, self._spool, self._on_new = config, spool, on_new
        self._ae = ae = AE(config.ae_title)
        ae.require_called_aet = True
        ae.require_calling_aet = list(config.calling_ae)
        ae.maximum_associations = config.limits.max_associations
        ae.network_timeout = ae.dimse_timeout = config.limits.network_timeout_s
        ae.acse_timeout = min(10.0, config.limits.network_timeout_s)
        ae.add_supported_context(Verification)
        for sop_class in (*FILMS, uid.SecondaryCaptureImageStorage)[: len(FILMS) + int(config.secondary_capture)]:
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
        tls = _server_context(self._config.tls) if self._config.tls else None
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
        self._server.tls, self._server.timeout_s = tls, limits.network_timeout_s
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
        logger.warning("an association was rejected: calling or called AE title not accepted, or too many at once")

    def _store(self, event: Event) -> Dataset | int:
        getattr(event.assoc, "meter", _NO_METER).reset()
        try:
            return self._accept(event)
        except SpoolFullError:
            logger.error("refused an instance: the spool or the disk is full")
            return _status(OUT_OF_RESOURCES, "out of space, send again later")
        except OSError as error:
            logger.error("refused an instance: the spool cannot be written (%s)", type(error).__name__)
            return _status(OUT_OF_RESOURCES, "spool cannot be written")
        # Whatever is wrong with an instance must not end the node; the text of an error may quote the header.
        except Exception as error:
            logger.error("refused an instance: %s", type(error).__name__)
            return _status(FAILURE, "internal error")

    def _accept(self, event: Event) -> Dataset | int:
        calling_ae = str(event.assoc.requestor.ae_title).strip()
        content = event.encoded_dataset()
        if len(content) > self._config.limits.max_instance_bytes:
            return _status(OUT_OF_RESOURCES, "instance too large")
        try:
            header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
            sop_instance_uid = str(header.SOPInstanceUID)
        except Exception:
            return _status(CANNOT_UNDERSTAND, "data set cannot be read")
        if sop_instance_uid != str(event.request.AffectedSOPInstanceUID) or header.SOPClassUID != event.request.AffectedSOPClassUID:
            return _status(MISMATCH, "data set is not the instance announced")
        name, decision = key_of(sop_instance_uid)[:12], decide(self._config, calling_ae, header)
        if decision.action == "refuse":
            logger.info("%s: refused from %s: %s", name, calling_ae, decision.reason)
            return _status(NOT_AUTHORIZED, f"refused: {decision.reason}")
        if decision.action == "pass":
            self._spool.settle_unread(sop_instance_uid, "passed", decision.reason)
            logger.info("%s: passed from %s: %s", name, calling_ae, decision.reason)
            return SUCCESS
        key = self._spool.accept(content, sop_instance_uid, calling_ae, decision.destinations)
        logger.info("%s: %s from %s", name, "accepted" if key else "known already", calling_ae)
        if key:
            self._on_new(key)
        return SUCCESS


class _Server(ThreadedAssociationServer):
    """Gives every connection a time limit, and makes the TLS handshake in the connection's own thread: a silent caller holds up nobody."""

    tls: ssl.SSLContext | None = None
    timeout_s = 60.0

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


def _status(code: int, comment: str) -> Dataset:
    ds = Dataset()
    ds.Status, ds.ErrorComment = code, comment[:64]
    return ds


def _server_context(tls: ServerTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(tls.certificate, tls.private_key)
        if tls.client_ca:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise ConfigError("The TLS certificate, key or client_ca cannot be read. Give PEM files that this user may read.") from error
    return context
