"""DICOM nodes of tests: one that sends films, one that takes results."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dicom_files import dicom, film

from benchmarks.gateway_nodes import CALLER, Archive, free_port, running_archive, send
from serve.gateway.config import GatewayConfig

__all__ = ["CALLER", "Archive", "free_port", "gateway_config", "made_certificate", "running_archive", "send", "study_film", "until"]


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


def made_certificate(folder: Path) -> tuple[Path, Path]:
    """Certificate and key of 127.0.0.1, signed by itself."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    try:
        subprocess.run([*command, *subject, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed (Debian package openssl)")
    return cert, key
