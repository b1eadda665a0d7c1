"""A real Orthanc forwards studies to the gateway and gets SR, overlay and segmentation back into them, as others read them."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import requests
from dicom_files import film
from dicom_nodes import free_port, gateway_config, study_film, until
from dicomweb_client import DICOMwebClient
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless
from report_endpoint import InProcess, running_endpoint
from tiny_model import tiny_model_folder

from serve.access_keys import add_key
from serve.gateway.service import Gateway
from serve.gateway.spool import read_status

pytestmark = pytest.mark.external
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
RESULTS = ("SR", "OT", "SEG")
# pynetdicom puts a program of the same name beside Python, which an activated environment would find first.
ELSEWHERE = os.pathsep.join(place for place in os.environ["PATH"].split(os.pathsep) if Path(place) != Path(sys.executable).parent)
STORESCU = shutil.which("storescu", path=ELSEWHERE)
TOOLS = ("dsrdump", "dsr2html", "dcmdump")
PROPOSE = {JPEG2000Lossless: "-xv", JPEGLSLossless: "-xt", RLELossless: "-xr"}
"""storescu's option for a transfer syntax."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    return InProcess(tiny_model_folder(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    program, tools = shutil.which("Orthanc"), [STORESCU, *(shutil.which(name) for name in TOOLS)]
    if not program or not PLUGIN.exists() or None in tools:
        pytest.skip("a server is not installed: make setup-servers (Debian packages orthanc, orthanc-dicomweb, dcmtk)")
    folder, http, dicom_port, gateway_port, web_port = tmp_path_factory.mktemp("orthanc"), *(free_port() for _ in range(4))
    key = add_key(folder / "keys.json", "orthanc", ["studies:write"])
    receiver = {"Url": f"http://127.0.0.1:{web_port}/", "HttpHeaders": {"Authorization": f"Bearer {key}"}}
    config = {
        "StorageDirectory": str(folder / "db"),
        "IndexDirectory": str(folder / "db"),
        "HttpPort": http,
        "DicomAet": "ORTHANC",
        "DicomPort": dicom_port,
        "AuthenticationEnabled": False,
        "DicomModalities": {"ssacl": ["SSACL", "127.0.0.1", gateway_port]},
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "Servers": {"ssacl": receiver}},
    }
    (folder / "orthanc.json").write_text(json.dumps(config))
    url = f"http://127.0.0.1:{http}"
    with (folder / "log").open("wb") as log, subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log) as server:
        try:
            until(lambda: _answers(f"{url}/system") or server.poll() is not None)
            assert server.poll() is None
            yield {"url": url, "dicom_port": dicom_port, "gateway_port": gateway_port, "web_port": web_port, "keys": folder / "keys.json"}
        finally:
            server.terminate()
            server.wait(30)


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False


def made_films(first: int) -> dict[int, tuple[str, bytes]]:
    """Number of the study -> storescu's option and a film: uncompressed, compressed, bright air, both."""
    deep = (255 - film(64)).astype(np.uint16) << 4
    depth = {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11}
    inverted = {"PhotometricInterpretation": "MONOCHROME1", "PixelData": deep.tobytes(), **depth}
    films = [
        ("-xe", {}),
        *((option, {"syntax": syntax}) for syntax, option in PROPOSE.items()),
        ("-xe", inverted),
        ("-xv", {**inverted, "syntax": JPEG2000Lossless}),
    ]
    return {number: (option, study_film(number, **changes)) for number, (option, changes) in enumerate(films, first)}


@pytest.mark.parametrize(
    ("forwards", "kind", "first"), [("c-store", "c-store", 10), ("c-store", "stow-rs", 20), ("stow-rs", "stow-rs", 30)]
)
def test_orthanc_forwards_studies_and_gets_results_in_them(
    tmp_path: Path, model: InProcess, orthanc: dict[str, Any], forwards: str, kind: str, first: int
) -> None:
    films = made_films(first)
    for number, (option, content) in films.items():
        (tmp_path / f"{number}.dcm").write_bytes(content)
        command = [str(STORESCU), option, "-aec", "ORTHANC", "127.0.0.1", str(orthanc["dicom_port"]), str(tmp_path / f"{number}.dcm")]
        subprocess.run(command, check=True, capture_output=True)
    destinations = {
        "c-store": {"kind": "c-store", "host": "127.0.0.1", "port": orthanc["dicom_port"], "ae_title": "ORTHANC"},
        "stow-rs": {"kind": "stow-rs", "url": f"{orthanc['url']}/dicom-web"},
    }
    endpoint_port = free_port()
    web = {"port": orthanc["web_port"], "access": {"keys_file": str(orthanc["keys"])}}
    changes = {"destinations": {"pacs": destinations[kind]}, "port": orthanc["gateway_port"], "calling_ae": ["ORTHANC"], "web": web}
    with running_endpoint(model, endpoint_port), Gateway(gateway_config(tmp_path / "spool", endpoint_port, 1, **changes)):
        for number in films:
            (study,) = find(orthanc, "Study", {"StudyInstanceUID": f"1.2.840.99.{number}"})
            forward(orthanc, study, forwards)
        until(lambda: read_status(tmp_path / "spool")["done"] == {"reported": len(films)})
        # The whole study once more, our results in it: a film is read once, and of results nothing is made.
        forward(orthanc, study, "stow-rs")
        assert read_status(tmp_path / "spool")["done"] == {"reported": len(films), "passed own_result": len(RESULTS)}
    web = DICOMwebClient(f"{orthanc['url']}/dicom-web")
    for number, (_, content) in films.items():
        study = f"1.2.840.99.{number}"
        # As a viewer finds them: all series of the one study, by QIDO-RS, and what they hold, by WADO-RS.
        found = [pydicom.Dataset.from_json(item) for item in web.search_for_series(study)]
        assert sorted(str(ds.Modality) for ds in found) == sorted(["DX", *RESULTS])
        results = {ds.Modality: ds for ds in web.retrieve_study(study) if ds.Modality in RESULTS}
        check_results(results, pydicom.dcmread(io.BytesIO(content)), tmp_path)
        (overlay,) = find(orthanc, "Instance", {"StudyInstanceUID": study, "Modality": "OT"})
        shown = requests.get(f"{orthanc['url']}/instances/{overlay}/preview", headers={"accept": "image/png"}, timeout=30)
        assert Image.open(io.BytesIO(shown.content)).size == (results["OT"].Columns, results["OT"].Rows)


def forward(orthanc: dict[str, Any], study: str, way: str) -> None:
    """Orthanc sends a study to the gateway."""
    if way == "c-store":
        sent = requests.post(f"{orthanc['url']}/modalities/ssacl/store", study, timeout=60)
        assert sent.ok, sent.text
        assert sent.json()["FailedInstancesCount"] == 0
    else:
        order = {"Resources": [study], "Synchronous": True}
        sent = requests.post(f"{orthanc['url']}/dicom-web/servers/ssacl/stow", json=order, timeout=60)
        assert sent.ok, sent.text


def find(orthanc: dict[str, Any], level: str, query: dict[str, str]) -> list[str]:
    """Orthanc's names of what meets the query."""
    names: list[str] = requests.post(f"{orthanc['url']}/tools/find", json={"Level": level, "Query": query}, timeout=30).json()
    return names


def check_results(results: dict[str, pydicom.Dataset], source: pydicom.Dataset, folder: Path) -> None:
    """dcmtk, pydicom and highdicom read them without a complaint, and they refer to the film."""
    for modality, ds in results.items():
        ds.save_as(folder / f"{modality}.dcm", enforce_file_format=True)
        said = subprocess.run(["dcmdump", "-q", str(folder / f"{modality}.dcm")], capture_output=True, text=True, check=True)
        assert said.stderr == ""
        assert (ds.PatientID, ds.AccessionNumber) == (source.PatientID, source.AccessionNumber)
    for tool in ("dsrdump", "dsr2html"):
        said = subprocess.run([tool, str(folder / "SR.dcm")], capture_output=True, text=True, check=True)
        assert "not for diagnosis" in said.stdout
        assert said.stderr == ""
    document = highdicom.sr.srread(folder / "SR.dcm")
    assert isinstance(document, highdicom.sr.ComprehensiveSR)
    assert (document.VerificationFlag, document.CompletionFlag) == ("UNVERIFIED", "PARTIAL")
    evidence = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert evidence.ReferencedSOPInstanceUID == source.SOPInstanceUID
    segmentation = highdicom.seg.segread(folder / "SEG.dcm")
    assert [uids[2] for uids in segmentation.get_source_image_uids()] == [source.SOPInstanceUID]
    assert segmentation.pixel_array.shape[-2:] == (source.Rows, source.Columns)
    assert results["OT"].pixel_array.shape == (results["OT"].Rows, results["OT"].Columns, 3)
