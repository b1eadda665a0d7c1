"""The DICOMweb source against a real Orthanc, and against a server that misbehaves."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from dicom_files import dicom, film

from ssacl.data.ingest import IngestSettings, run_local
from ssacl.data.sources import SourceOptions, dicomweb, open_source
from ssacl.errors import ConfigError, DataError, StorageError

SETTINGS = IngestSettings(key_secret="a secret of the tests")
PLUGINS = Path("/usr/share/orthanc/plugins")
NUM_STUDIES = 5


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def films() -> Iterator[bytes]:
    """Radiographs of five studies, one of them with a lateral film, and a CT."""
    for number in range(NUM_STUDIES):
        pixels = film(64).copy()
        pixels[0, number] = 255
        yield dicom(pixels, SOPInstanceUID=f"1.2.3.{number}.1.1", **identity(number, 1))
    yield dicom(film(64)[::-1].copy(), ViewPosition="LL", SOPInstanceUID="1.2.3.0.2.1", **identity(0, 2))
    yield dicom(film(64), Modality="CT", SOPInstanceUID="1.2.3.9.1.1", **identity(9, 1))


def identity(study: int, series: int) -> dict[str, str]:
    return {
        "StudyInstanceUID": f"1.2.3.{study}",
        "SeriesInstanceUID": f"1.2.3.{study}.{series}",
        "PatientID": f"PLANTED{study}",
        "StudyDate": f"2024010{study + 1}"[:8],
    }


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program, plugin = shutil.which("Orthanc"), PLUGINS / "libOrthancDicomWeb.so"
    if not program or not plugin.exists():
        pytest.skip("Orthanc is not installed: make setup-servers (Debian packages orthanc, orthanc-dicomweb)")
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port()
    config = {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"reader": "a password"},
        "Plugins": [str(plugin)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    with (folder / "log").open("wb") as log, subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log) as server:
        try:
            wait_until_up(f"http://127.0.0.1:{port}/system", server)
            for content in films():
                assert requests.post(f"http://127.0.0.1:{port}/instances", content, auth=("reader", "a password"), timeout=30).ok
            yield f"http://127.0.0.1:{port}/dicom-web"
        finally:
            server.terminate()
            server.wait(30)


def wait_until_up(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        try:
            if requests.get(url, auth=("reader", "a password"), timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.1)
    raise AssertionError("Orthanc did not start")


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    dicomweb._client.cache_clear()
    monkeypatch.setenv("DICOMWEB_USER", "reader")
    monkeypatch.setenv("DICOMWEB_PASSWORD", "a password")


@pytest.mark.external
def test_every_radiograph_of_a_pacs_is_ingested_page_by_page(
    orthanc: str, credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dicomweb, "PAGE_SIZE", 2)
    with caplog.at_level("DEBUG"):
        summary = run_local("dicomweb", orthanc, str(tmp_path / "set"), SETTINGS)
    assert summary.num_studies == NUM_STUDIES
    assert sum(summary.num_samples.values()) == NUM_STUDIES
    assert summary.rejects == {"lateral": 1}
    assert "PLANTED" not in caplog.text
    assert "1.2.3." not in caplog.text
    assert run_local("dicomweb", orthanc, str(tmp_path / "set"), SETTINGS).num_shards_written == 0


@pytest.mark.external
def test_a_query_and_a_limit_bound_what_is_asked_for(orthanc: str, credentials: None) -> None:
    assert len(list(open_source("dicomweb", orthanc, SourceOptions(query={"StudyDate": "20240102-20240103"})))) == 2
    assert len(list(open_source("dicomweb", orthanc, SourceOptions(max_studies=3)))) == 3
    with pytest.raises(DataError, match="no CR/DX/RG study that matches PatientID") as caught:
        open_source("dicomweb", orthanc, SourceOptions(query={"PatientID": "PLANTEDNOWHERE"}))
    assert "PLANTED" not in str(caught.value)


@pytest.mark.external
def test_a_film_that_is_gone_is_a_named_reject(orthanc: str, credentials: None, tmp_path: Path) -> None:
    studies = open_source("dicomweb", orthanc, SourceOptions(query={"StudyInstanceUID": "1.2.3.4"}))
    image = next(studies).images[0].reader
    assert image is not None
    pixels = image.read(1 << 30)
    assert np.array_equal(np.frombuffer(pixels[-64 * 64 :], np.uint8)[100:], film(64).ravel()[100:])
    gone = dicomweb.WadoImage(orthanc, "1.2.3.4", "1.2.3.4.1", "1.2.3.77")
    with pytest.raises(FileNotFoundError):
        gone.read(1 << 30)


@pytest.mark.external
def test_a_wrong_password_is_named(orthanc: str, credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    dicomweb._client.cache_clear()
    monkeypatch.setenv("DICOMWEB_PASSWORD", "wrong")
    with pytest.raises(StorageError, match=r"answers 401\. Set DICOMWEB_USER"):
        open_source("dicomweb", orthanc)


@pytest.fixture
def odd_server() -> Iterator[str]:
    """Answers every search with the same full page, whatever the offset, and every film with a body without end."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "instances" in self.path:
                self.send_response(200)
                self.send_header("Content-Type", 'multipart/related; type="application/dicom"; boundary=x')
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(bytes(1 << 20))
                except OSError:
                    return
            page = [{"0020000D": {"vr": "UI", "Value": [f"1.2.{number}"]}} for number in range(dicomweb.PAGE_SIZE)]
            body = b"<html>" if "offset" not in self.path else json.dumps(page).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/dicom+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    dicomweb._client.cache_clear()
    yield f"http://127.0.0.1:{server.server_port}/dicom-web"
    server.shutdown()
    server.server_close()


def test_a_server_without_offsets_or_ends_is_bounded(odd_server: str) -> None:
    assert len(list(dicomweb._studies(odd_server, {}))) == dicomweb.PAGE_SIZE
    with pytest.raises(dicomweb.RefusedImageError) as caught:
        dicomweb.WadoImage(odd_server, "1.2", "1.3", "1.4").read(8 << 20)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("http://127.0.0.1:9/dicom-web", StorageError, "cannot be reached"),
        ("http://user:secret@127.0.0.1/dicom-web", ConfigError, "DICOMWEB_USER"),
        ("ftp://127.0.0.1", ConfigError, "give its http"),
    ],
)
def test_a_server_that_cannot_be_reached_is_named(url: str, error: type[Exception], said: str) -> None:
    dicomweb._client.cache_clear()
    with pytest.raises(error, match=said) as caught:
        open_source("dicomweb", url)
    assert "secret" not in str(caught.value)
