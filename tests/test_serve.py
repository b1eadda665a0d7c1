"""The endpoint: the HTTP interface over the real model in this process, then the whole application on Ray Serve."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from dicom_nodes import study_film
from PIL import Image
from report_endpoint import FAST, InProcess
from tiny_model import encoded_film, tiny_model_folder

from serve.app import build_app, run_server
from serve.ingress import build_api
from serve.problems import OverloadedError
from serve.schemas import ReportResponse
from serve.settings import ServeSettings
from ssacl.data.dicom import Picture
from ssacl.errors import CheckpointError, ConfigError, ServeError
from ssacl.inference.generator import GenerationOptions
from ssacl.inference.report import DraftReport

SECRET = "DOE-JOHN-1955"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def gateway(model: Path) -> InProcess:
    return InProcess(model)


def settings(model: Path | str = "unused", **changes: Any) -> ServeSettings:
    return ServeSettings(**({"checkpoint_url": str(model), "generation": FAST} | changes))


def ask(gateway: Any, *arguments: Any, given: ServeSettings | None = None, **keywords: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(build_api(gateway, given or settings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return await client.request(*arguments, **keywords)

    return asyncio.run(send())


def post(gateway: Any, content: bytes, kind: str = "image/png", given: ServeSettings | None = None, **keywords: Any) -> httpx.Response:
    headers = {"content-type": kind} | keywords.pop("headers", {})
    return ask(gateway, "POST", "/v1/reports", content=content, headers=headers, given=given, **keywords)


@pytest.mark.parametrize(("kind", "media"), [("DICOM", "application/dicom"), ("PNG", "image/png"), ("JPEG", "image/jpeg")])
def test_raw_body_and_multipart_give_the_same_draft(gateway: InProcess, kind: str, media: str) -> None:
    content = encoded_film(kind, width=120, height=90, seed=4)
    raw = post(gateway, content, media)
    assert raw.status_code == 200
    tree = raw.json()
    ReportResponse.model_validate(tree)
    assert tree["request_id"] == raw.headers["x-ssacl-request-id"]
    assert (tree["image_width_px"], tree["image_height_px"], tree["status"]) == (120, 90, "preliminary")
    assert np.asarray(tree["anatomy_maps"]).shape == (32, 16, 16)
    assert "PLANTED" not in raw.text
    parts = ask(gateway, "POST", "/v1/reports?maps=false", files={"file": (f"../../{SECRET}.dcm", content, "text/html")})
    assert parts.status_code == 200
    assert SECRET not in parts.text
    assert parts.json()["text"] == tree["text"]
    assert parts.json()["findings"] == tree["findings"]
    assert parts.json()["anatomy_maps"] is None


def test_several_images_the_first_frontal_one_is_read(gateway: InProcess) -> None:
    films = [b"no picture", encoded_film("PNG", seed=1), encoded_film("PNG", seed=2)]
    answer = ask(gateway, "POST", "/v1/reports", files=[("file", ("x", film)) for film in films])
    assert answer.status_code == 200
    assert answer.json()["image_index"] == 1
    assert [(item["index"], item["reason"]) for item in answer.json()["unused"]] == [(0, "not_a_picture"), (2, "another")]


@pytest.mark.parametrize("query", ["", "?picture=overlay", "?node=carina"])
def test_png_on_request(gateway: InProcess, query: str) -> None:
    answer = ask(gateway, "POST", f"/v1/reports{query}", files={"file": encoded_film("PNG")}, headers={"accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).width == (1350 if query == "" else 96)


@pytest.mark.parametrize("accept", ["application/dicom", 'multipart/related; type="application/dicom"'])
def test_dicom_on_request(gateway: InProcess, accept: str) -> None:
    content = study_film(1)
    answer = post(gateway, content, "application/dicom", headers={"accept": accept})
    assert answer.status_code == 200
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == 'multipart/related; type="application/dicom"'
    parts = answer.content.split(f"--{boundary}".encode())[1:-1]
    read = [pydicom.dcmread(io.BytesIO(part.partition(b"\r\n\r\n")[2])) for part in parts]
    assert [(ds.Modality, ds.StudyInstanceUID) for ds in read] == [(name, "1.2.840.99.1") for name in ("SR", "OT", "SEG")]
    for no_study in (encoded_film("PNG"), encoded_film("DICOM")):
        refused = post(gateway, no_study, headers={"accept": accept})
        assert refused.status_code == 422
        check_problem(refused)


BAD = {
    "empty": (b"", "image/png", 400),
    "text": (b"The patient has a cough.", "application/dicom", 415),
    "zip": (b"PK\x03\x04" + bytes(100), "image/png", 415),
    "truncated PNG": (encoded_film("PNG")[:200], "image/png", 422),
    "truncated JPEG": (encoded_film("JPEG")[:150], "image/jpeg", 422),
    "truncated DICOM": (encoded_film("DICOM")[:900], "application/dicom", 422),
    "DICOM preamble alone": (bytes(128) + b"DICM", "application/dicom", 422),
    "thumbnail": (encoded_film("PNG", 20, 20), "image/png", 422),
    "another content type": (encoded_film("PNG"), "text/plain", 415),
    "no content type": (encoded_film("PNG"), "", 415),
    "multipart without boundary": (b"x", "multipart/form-data", 400),
    "damaged multipart": (b"--b\r\nnonsense", "multipart/form-data; boundary=b", 400),
    "too large": (encoded_film("PNG") + bytes(70_000), "image/png", 413),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_uploads_get_a_problem(gateway: InProcess, name: str) -> None:
    content, kind, status = BAD[name]
    answer = post(gateway, content, kind, given=settings(max_upload_bytes=60_000), headers={"x-planted": SECRET})
    assert answer.status_code == status, answer.text
    check_problem(answer)


def check_problem(answer: httpx.Response) -> None:
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["type"].startswith("urn:ssacl:problem:")
    assert len(problem["detail"]) > 10
    assert problem["request_id"] == answer.headers["x-ssacl-request-id"]
    for hidden in (SECRET, "PLANTED", "Traceback", "cough", 'File "'):
        assert hidden not in answer.text


FILE, PNG = {"file": encoded_film("PNG")}, {"accept": "image/png"}


@pytest.mark.parametrize(
    ("keywords", "status"),
    [
        ({"method": "GET", "url": "/nothing"}, 404),
        ({"method": "GET", "url": "/v1/reports"}, 405),
        ({"method": "POST", "url": f"/v1/reports?picture={SECRET}"}, 400),
        ({"method": "POST", "url": "/v1/reports?sentence=-1"}, 400),
        ({"method": "POST", "url": "/v1/reports?node=spleen", "files": FILE}, 400),
        (
            {
                "method": "POST",
                "url": "/v1/reports?sentence=900",
                "files": FILE,
                "headers": {"accept": "image/png"},
            },
            400,
        ),
        ({"method": "POST", "url": "/v1/reports", "files": FILE, "headers": {"accept": "text/html"}}, 406),
        ({"method": "POST", "url": "/v1/reports", "files": {"image": encoded_film("PNG")}}, 400),
        ({"method": "POST", "url": "/v1/reports", "data": {"file": "/etc/passwd"}, "files": {"other": b"x"}}, 400),
        ({"method": "POST", "url": "/v1/reports", "files": [("file", encoded_film("PNG"))] * 12}, 413),
    ],
)
def test_bad_requests_get_a_problem(gateway: InProcess, keywords: dict[str, Any], status: int) -> None:
    answer = ask(gateway, **keywords)
    assert answer.status_code == status, answer.text
    check_problem(answer)


def test_nothing_of_an_upload_reaches_the_disk(gateway: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not-there"))
    film = encoded_film("PNG", 1400, 1400)
    assert len(film) > 2**20
    assert ask(gateway, "POST", "/v1/reports", files={"file": film}).status_code == 200


class Failing(InProcess):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def report(self, picture: Picture, model: str | None = None) -> Coroutine[Any, Any, DraftReport]:
        raise self.error

    def describe(self) -> Coroutine[Any, Any, dict[str, Any]]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"), [(OverloadedError(), 503), (CheckpointError(SECRET), 503), (TimeoutError(), 504), (RuntimeError(SECRET), 500)]
)
def test_failures_behind_the_interface_get_a_problem(error: Exception, status: int) -> None:
    answer = post(Failing(error), encoded_film("PNG"))
    assert answer.status_code == status
    check_problem(answer)
    assert status == 500 or int(answer.headers["retry-after"]) > 0
    ready = ask(Failing(error), "GET", "/readyz")
    assert ready.status_code == 503
    check_problem(ready)
    assert ask(Failing(error), "GET", "/healthz").json() == {"status": "ok"}


def test_time_limit_is_504(model: Path) -> None:
    answer = post(InProcess(model, GenerationOptions(time_limit_s=1e-6)), encoded_film("PNG"))
    assert answer.status_code == 504
    check_problem(answer)


def test_openapi_names_every_answer(gateway: InProcess) -> None:
    tree = ask(gateway, "GET", "/openapi.json").json()
    operation = tree["paths"]["/v1/reports"]["post"]
    assert set(operation["requestBody"]["content"]) >= {"multipart/form-data", "application/dicom", "image/png", "image/jpeg"}
    assert {"200", "400", "413", "415", "422", "503"} <= set(operation["responses"])
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "image/png", "multipart/related", "application/fhir+json"}
    assert "application/problem+json" in operation["responses"]["415"]["content"]
    assert {"/v1/models", "/healthz", "/readyz"} <= set(tree["paths"])


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_batchsize"):
        build_app({"checkpoint_url": "m", "max_batchsize": 3})
    with pytest.raises(ConfigError, match="port"):
        ServeSettings.parse({"checkpoint_url": "m", "port": 99999})
    assert ServeSettings.parse(settings().model_dump(mode="json")) == settings()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_taken_port_and_a_missing_model_are_errors(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"Port {port} .* --port"):
            run_server(settings(model, port=port), blocking=False)
    with pytest.raises(CheckpointError, match="model folder"):
        run_server(settings(tmp_path, port=free_port()), blocking=False)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[str]:
    with run_server(settings(model, port=0, max_upload_bytes=60_000), blocking=False) as running:
        yield running.url


@pytest.mark.ray
@pytest.mark.slow
def test_the_application_on_ray_serve(server: str, gateway: InProcess) -> None:
    with httpx.Client(base_url=server, timeout=60) as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        version = client.get("/v1/models").json()["models"][0]["model_version"]
        for kind in ("DICOM", "PNG", "JPEG"):
            content = encoded_film(kind, seed=9)
            answer = client.post("/v1/reports", files={"file": content})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model_version"] == version
            assert answer.json()["text"] == ask(gateway, "POST", "/v1/reports", files={"file": content}).json()["text"]
        overlay = client.post("/v1/reports?picture=overlay", files={"file": content}, headers={"accept": "image/png"})
        assert overlay.content.startswith(b"\x89PNG")
        for content, kind, status in BAD.values():
            answer = client.post("/v1/reports", content=content, headers={"content-type": kind} if kind else {})
            assert answer.status_code == status, answer.text
            check_problem(answer)
        assert client.get("/nothing").status_code == 404


@pytest.mark.ray
@pytest.mark.slow
def test_requests_at_once_are_all_answered(server: str) -> None:
    async def send() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server, timeout=120) as client:
            return await asyncio.gather(*(client.post("/v1/reports", files={"file": encoded_film("PNG", seed=seed)}) for seed in range(24)))

    answers = asyncio.run(send())
    assert [answer.status_code for answer in answers] == [200] * 24
    assert len({answer.json()["image_ref"] for answer in answers}) == 24


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(model: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "ssacl.cli", "serve", "--checkpoint", str(model), "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/reports", files={"file": encoded_film("DICOM")}, timeout=60)
            assert answer.status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    assert "PLANTED" not in text
    assert json.dumps(answer.json()["text"]) not in text
