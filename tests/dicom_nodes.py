"""DICOM nodes of tests: one that sends films, one that takes results."""

from __future__ import annotations

import io
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
from dicom_files import dicom, film
from pynetdicom import AE, evt

from serve.gateway.config import GatewayConfig
from serve.gateway.endpoint import RESULTS

CALLER = "SENDER"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def until(condition: Callable[[], Any], limit_s: float = 60.0) -> None:
    """Wait for what must come."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def study_film(number: int = 1, **attributes: Any) -> bytes:
    """A film of its own study; `number` names it."""
    pixels = film(64).copy()
    pixels[0, 0] = number % 256
    root = f"1.2.840.99.{number}"
    ids = {
        "StudyInstanceUID": root,
        "SeriesInstanceUID": f"{root}.1",
        "SOPInstanceUID": f"{root}.1.1",
        "AccessionNumber": f"PLANTED{number}",
    }
    return dicom(pixels, **{**ids, **attributes})


def send(port: int, *contents: bytes, caller: str = CALLER, called: str = "SSACL", tls_args: Any = None) -> list[int | None]:
    """C-STORE each; the statuses, None where there was no answer. Empty where the association was not accepted."""
    ae = AE(caller)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
    datasets = [pydicom.dcmread(io.BytesIO(content)) for content in contents]
    for ds in datasets:
        ae.add_requested_context(ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.TransferSyntaxUID)
    association = ae.associate("127.0.0.1", port, ae_title=called, tls_args=tls_args)
    if not association.is_established:
        return []
    statuses: list[int | None] = []
    for ds in datasets:
        try:
            statuses.append(association.send_c_store(ds).get("Status"))
        except (RuntimeError, ValueError):
            statuses.append(None)
    if association.is_established:
        association.release()
    return statuses


class Archive:
    """A storage node that keeps what it is sent."""

    def __init__(self, answer: int = 0x0000) -> None:
        self.answer = answer
        self.received: list[pydicom.Dataset] = []
        self.contents: list[bytes] = []

    def studies(self) -> dict[str, list[str]]:
        """Study -> modalities of what came, in the order of their names."""
        found: dict[str, list[str]] = {}
        for ds in list(self.received):
            found.setdefault(str(ds.StudyInstanceUID), []).append(str(ds.Modality))
        return {study: sorted(modalities) for study, modalities in found.items()}

    def store(self, event: Any) -> int:
        content = event.encoded_dataset()
        if self.answer == 0:
            self.contents.append(content)
            self.received.append(pydicom.dcmread(io.BytesIO(content)))
        return self.answer


@contextmanager
def running_archive(archive: Archive, port: int) -> Iterator[Archive]:
    ae = AE("ARCHIVE")
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    for sop_class in RESULTS:
        ae.add_supported_context(sop_class)
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, archive.store)])
    try:
        yield archive
    finally:
        assert server is not None
        server.shutdown()


def gateway_config(spool: Path, endpoint_port: int, archive_port: int, **changes: Any) -> GatewayConfig:
    tree: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "calling_ae": [CALLER],
        "spool": str(spool),
        "endpoint": {"url": f"http://127.0.0.1:{endpoint_port}/v1/reports"},
        "destinations": {"archive": {"kind": "c-store", "host": "127.0.0.1", "port": archive_port, "ae_title": "ARCHIVE"}},
        "retry": {"first_s": 0.1, "longest_s": 0.4, "max_attempts": 3},
        "limits": {"min_free_bytes": 0},
    }
    return GatewayConfig.model_validate({**tree, **changes})
