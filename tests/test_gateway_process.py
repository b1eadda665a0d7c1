"""The `ssacl gateway` process under kill -9, and a round trip through a real Orthanc."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from dicom_files import film
from dicom_nodes import Archive, free_port, gateway_config, running_archive, send, study_film, until
from pydicom.uid import JPEG2000Lossless
from report_endpoint import InProcess, running_endpoint
from tiny_model import tiny_model_folder

from benchmarks.gateway_nodes import GatewayProcess
from serve.gateway.service import Gateway
from serve.gateway.spool import read_status

ALL = ["OT", "SEG", "SR"]
ROOT = Path(__file__).parents[1]
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    return InProcess(tiny_model_folder(tmp_path_factory.mktemp("model") / "model"))


def gateway_process(folder: Path, endpoint_port: int, archive_port: int, port: int) -> GatewayProcess:
    """The command, until the end of the block or until it is killed."""
    return GatewayProcess(folder, gateway_config(folder / "spool", endpoint_port, archive_port, port=port))


def test_a_film_accepted_before_kill_9_is_reported_after_it(tmp_path: Path, model: InProcess) -> None:
    ports = endpoint_port, archive_port, _ = [free_port() for _ in range(3)]
    with running_archive(Archive(), archive_port) as archive:
        with gateway_process(tmp_path, *ports) as gateway:
            assert send(ports[2], study_film(1), study_film(2)) == [0, 0]
            gateway.kill()
        assert read_status(tmp_path / "spool")["waiting"] == 2
        with running_endpoint(model, endpoint_port), gateway_process(tmp_path, *ports) as gateway:
            until(lambda: read_status(tmp_path / "spool")["done"] == {"reported": 2})
            command = [sys.executable, "-m", "ssacl.cli", "gateway", "--config", str(tmp_path / "gateway.yaml"), "--status"]
            told = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
            assert json.loads(told.stdout)["done"] == {"reported": 2}
            assert gateway.stop() == 0
    assert archive.studies() == {f"1.2.840.99.{number}": ALL for number in (1, 2)}
    log = (tmp_path / "log").read_text()
    for hidden in ("PLANTED", "1.2.840.99"):
        assert hidden not in log


def test_films_sent_while_it_is_killed_at_random_have_one_result_each(tmp_path: Path, model: InProcess) -> None:
    """Whatever was answered with Success has its results once; what was not is sent again, as an archive does."""
    chance = random.Random(5)
    ports = endpoint_port, archive_port, port = [free_port() for _ in range(3)]
    left = list(range(1, 9))
    with running_archive(Archive(), archive_port) as archive, running_endpoint(model, endpoint_port):
        for _ in range(2):
            with gateway_process(tmp_path, *ports) as gateway:
                for number in left[:4]:
                    if send(port, study_film(number)) == [0]:
                        left.remove(number)
                time.sleep(chance.uniform(0.0, 0.8))
                gateway.kill()
        assert len(left) < 8
        accepted = set(range(1, 9)) - set(left)
        with gateway_process(tmp_path, *ports):
            until(lambda: read_status(tmp_path / "spool")["done"].get("reported") == len(accepted))
    assert archive.studies().keys() == {f"1.2.840.99.{number}" for number in accepted}
    instances = archive.instances()
    # A result sent again after a crash is the same instance.
    assert all(len(uids) == 1 for uids in instances.values())
    assert len(instances) == 3 * len(accepted)
    assert read_status(tmp_path / "spool")["quarantine"] == {}


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    program, tools = shutil.which("Orthanc"), [shutil.which(name) for name in ("storescu", "dsrdump")]
    if not program or not PLUGIN.exists() or None in tools:
        pytest.skip("a server is not installed: make setup-servers (Debian packages orthanc, orthanc-dicomweb, dcmtk)")
    folder, http, dicom_port, gateway_port = tmp_path_factory.mktemp("orthanc"), free_port(), free_port(), free_port()
    config = {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": http,
        "DicomAet": "ORTHANC",
        "DicomPort": dicom_port,
        "AuthenticationEnabled": False,
        "DicomModalities": {"ssacl": ["SSACL", "127.0.0.1", gateway_port]},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    url = f"http://127.0.0.1:{http}"
    with (folder / "log").open("wb") as log, subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log) as server:
        try:
            until(lambda: _answers(f"{url}/system") or server.poll() is not None)
            assert server.poll() is None
            yield {"url": url, "dicom_port": dicom_port, "gateway_port": gateway_port}
        finally:
            server.terminate()
            server.wait(30)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


@pytest.mark.external
@pytest.mark.parametrize("kind", ["c-store", "stow-rs"])
def test_orthanc_forwards_studies_and_gets_results_in_them(tmp_path: Path, model: InProcess, orthanc: dict[str, Any], kind: str) -> None:
    first = 10 if kind == "c-store" else 20
    deep = (255 - film(64)).astype(np.uint16) << 4
    films = {
        first: study_film(first),
        first + 1: study_film(first + 1, syntax=JPEG2000Lossless),
        first + 2: study_film(
            first + 2, PhotometricInterpretation="MONOCHROME1", PixelData=deep.tobytes(), BitsAllocated=16, BitsStored=12, HighBit=11
        ),
    }
    for number, content in films.items():
        (tmp_path / f"{number}.dcm").write_bytes(content)
        syntax = "-xv" if number == first + 1 else "-xe"
        command = ["storescu", syntax, "-aec", "ORTHANC", "127.0.0.1", str(orthanc["dicom_port"]), str(tmp_path / f"{number}.dcm")]
        subprocess.run(command, check=True, capture_output=True)
    destinations = {
        "c-store": {"kind": "c-store", "host": "127.0.0.1", "port": orthanc["dicom_port"], "ae_title": "ORTHANC"},
        "stow-rs": {"kind": "stow-rs", "url": f"{orthanc['url']}/dicom-web"},
    }
    endpoint_port = free_port()
    changes = {"destinations": {"pacs": destinations[kind]}, "port": orthanc["gateway_port"], "calling_ae": ["ORTHANC"]}
    with running_endpoint(model, endpoint_port), Gateway(gateway_config(tmp_path / "spool", endpoint_port, 1, **changes)):
        for number in films:
            asked = {"Level": "Study", "Query": {"StudyInstanceUID": f"1.2.840.99.{number}"}}
            (study,) = requests.post(f"{orthanc['url']}/tools/find", json=asked, timeout=30).json()
            sent = requests.post(f"{orthanc['url']}/modalities/ssacl/store", study, timeout=60)
            assert sent.ok, sent.text
            assert sent.json()["FailedInstancesCount"] == 0
        until(lambda: read_status(tmp_path / "spool")["done"] == {"reported": len(films)})
    for number in films:
        asked = {"Level": "Series", "Expand": True, "Query": {"StudyInstanceUID": f"1.2.840.99.{number}"}}
        series = requests.post(f"{orthanc['url']}/tools/find", json=asked, timeout=30).json()
        by_modality = {item["MainDicomTags"]["Modality"]: item for item in series}
        assert sorted(by_modality) == sorted(["DX", *ALL])
        (report,) = by_modality["SR"]["Instances"]
        (tmp_path / "sr.dcm").write_bytes(requests.get(f"{orthanc['url']}/instances/{report}/file", timeout=30).content)
        shown = subprocess.run(["dsrdump", str(tmp_path / "sr.dcm")], capture_output=True, text=True, check=True)
        assert "not for diagnosis" in shown.stdout
        assert "E:" not in shown.stderr
