"""What stands around a gateway: a node that sends films, an archive that takes results, and the gateway's process, which may be killed."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydicom
import yaml
from pynetdicom import AE, evt

from benchmarks.record import REPOSITORY
from serve.gateway.config import GatewayConfig
from serve.gateway.endpoint import RESULTS
from ssacl.errors import ServeError

CALLER = "SENDER"
_START_S = 120.0


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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

    def instances(self) -> dict[tuple[str, str], set[str]]:
        """(study, modality) -> instances of it; one that was sent again is the same instance."""
        found: dict[tuple[str, str], set[str]] = {}
        for ds in list(self.received):
            found.setdefault((str(ds.StudyInstanceUID), str(ds.Modality)), set()).add(str(ds.SOPInstanceUID))
        return found

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


class GatewayProcess:
    """`ssacl gateway` as a process; at the end of the block it is killed.

    Raises
    ------
    ServeError
        It ends before it listens. Its output is in `folder/log`.
    """

    def __init__(self, folder: Path, config: GatewayConfig) -> None:
        self._folder, self._config = folder, config
        (folder / "gateway.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
        self.process = self._start()

    def restart(self) -> None:
        """As a service manager does after the process has died."""
        self.process = self._start()

    def kill(self) -> None:
        """With signal 9: nothing in it can clean up."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """With SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def __enter__(self) -> GatewayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ssacl.cli", "gateway", "--config", str(self._folder / "gateway.yaml")]
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
        end = time.monotonic() + _START_S
        while not self._listens():
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                process.wait()
                raise ServeError(f"The gateway did not start; {self._folder / 'log'} says why.")
            time.sleep(0.05)
        return process

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._config.port)) == 0
