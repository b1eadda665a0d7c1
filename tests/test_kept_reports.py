"""Several images of a study, answers that are fetched later, and answers as FHIR."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from api_calls import call, made_api
from dicom_nodes import study_film
from fastapi import FastAPI
from fhir.resources.bundle import Bundle as BundleR5
from fhir.resources.R4B.bundle import Bundle as BundleR4B
from report_endpoint import InProcess
from tiny_model import encoded_film, tiny_model_folder

from serve.access_keys import add_key
from serve.kept import JobState, KeptReports
from serve.service_settings import KeptSettings
from ssacl.data.dicom import Picture
from ssacl.inference.report import DraftReport

LATER = {"prefer": "respond-async"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    return InProcess(tiny_model_folder(tmp_path_factory.mktemp("model") / "model"))


def dated(content: bytes, date: str, **attributes: Any) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(content))
    ds.AcquisitionDate, ds.AcquisitionTime = date[:8], date[8:]
    for keyword, value in attributes.items():
        setattr(ds, keyword, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def test_the_newest_frontal_film_of_a_study_is_read(gateway: InProcess) -> None:
    old = dated(encoded_film("DICOM", seed=1), "20260101080000")
    new = dated(encoded_film("DICOM", seed=2), "20260101093000")
    lateral = dated(encoded_film("DICOM", seed=3), "20260102080000", ViewPosition="LATERAL")
    files = [("file", ("x", content)) for content in (old, lateral, new, new, encoded_film("PNG"))]
    answer = call(made_api(gateway), "POST", "/v1/reports?maps=false", files=files)
    assert answer.status_code == 200, answer.text
    tree = answer.json()
    assert tree["image_index"] == 2
    assert [(item["index"], item["reason"]) for item in tree["unused"]] == [
        (0, "another"),
        (1, "lateral"),
        (3, "duplicate"),
        (4, "another"),
    ]
    several = [("file", ("x", dated(old, "20260101080000", StudyInstanceUID=f"1.2.{number}"))) for number in (3, 4)]
    refused = call(made_api(gateway), "POST", "/v1/reports", files=several)
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:ssacl:problem:several-studies")


@pytest.mark.parametrize(("version", "bundle"), [("4.3", BundleR4B), ("5.0", BundleR5)])
def test_fhir_on_request(gateway: InProcess, version: str, bundle: Any) -> None:
    film = encoded_film("DICOM")
    accept = {"accept": f"application/fhir+json; fhirVersion={version}"}
    answer = call(made_api(gateway), "POST", "/v1/reports", headers=accept, files={"file": film})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == f"application/fhir+json; fhirVersion={version}"
    read = bundle.model_validate_json(answer.content)
    plain = call(made_api(gateway), "POST", "/v1/reports", files={"file": film}).json()
    by_address = {entry.fullUrl: entry.resource for entry in read.entry}
    report = read.entry[0].resource
    assert report.status == "preliminary"
    assert report.conclusion.startswith(plain["text"])
    assert "not for diagnosis" in report.conclusion
    observed = {item.code.text: item for item in (by_address[reference.reference] for reference in report.result)}
    assert {name: item.valueBoolean for name, item in observed.items()} == {item["name"]: item["present"] for item in plain["findings"]}
    for item in plain["findings"]:
        assert float(observed[item["name"]].component[0].valueQuantity.value) == pytest.approx(100 * item["probability"], abs=0.006)
        assert observed[item["name"]].status == "preliminary"
    assert report.performer[0].reference in by_address
    assert plain["image_ref"] in [item.value for item in report.identifier]
    assert "PLANTED" not in answer.text


def test_other_fhir_versions_are_refused(gateway: InProcess) -> None:
    for version in ("3.0", "6.0", "x"):
        accept = {"accept": f"application/fhir+json; fhirVersion={version}"}
        assert call(made_api(gateway), "POST", "/v1/reports", headers=accept, files={"file": encoded_film("PNG")}).status_code == 406


class Client:
    """Calls within one event loop, as a server has it, so that what was accepted goes on between them."""

    def __init__(self, api: FastAPI) -> None:
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://endpoint")

    async def __call__(self, method: str, path: str, key: str = "", **keywords: Any) -> httpx.Response:
        headers = keywords.pop("headers", {}) | ({"authorization": f"Bearer {key}"} if key else {})
        return await self._http.request(method, path, headers=headers, **keywords)

    async def settled(self, path: str, key: str = "") -> httpx.Response:
        end = time.monotonic() + 60
        while (answer := await self("GET", path, key)).status_code == 202:
            assert answer.json()["status"] == "running"
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        return answer


def test_an_answer_is_fetched_later_by_its_client_alone(gateway: InProcess, tmp_path: Path) -> None:
    keys, kept = tmp_path / "keys.json", tmp_path / "kept"
    own, other = (add_key(keys, name, ["reports:write", "reports:read"]) for name in ("own", "other"))
    service = {"access": {"keys_file": str(keys)}, "kept": {"url": str(kept)}}
    film = encoded_film("DICOM")

    async def use() -> str:
        client = Client(made_api(gateway, **service))
        answer = await client("POST", "/v1/reports", own, headers=LATER, files={"file": film})
        assert answer.status_code == 202, answer.text
        assert answer.headers["preference-applied"] == "respond-async"
        place = answer.headers["location"]
        assert place == f"/v1/reports/{answer.json()['id']}"
        assert len(list(kept.glob("*.json"))) == 1
        done = await client.settled(place, own)
        now = (await client("POST", "/v1/reports", own, files={"file": film})).json()
        assert done.headers["content-type"] == "application/json"
        assert {**done.json(), "request_id": ""} == {**now, "request_id": ""}
        for wrong in (other, ""):
            assert (await client("GET", place, wrong)).status_code == (404 if wrong else 401)
        assert (await client("DELETE", place, other)).status_code == 404
        # A bad film is refused at once, not accepted and failed later.
        assert (await client("POST", "/v1/reports", own, headers=LATER, content=b"x")).status_code == 415
        fhir = await client("POST", "/v1/reports", own, headers={**LATER, "accept": "application/fhir+json"}, files={"file": film})
        bundle = await client.settled(fhir.headers["location"], own)
        assert BundleR4B.model_validate_json(bundle.content).type == "collection"
        assert (await client("DELETE", fhir.headers["location"], own)).status_code == 204
        assert (await client("GET", fhir.headers["location"], own)).status_code == 404
        return place

    place = asyncio.run(use())
    assert sorted(path.suffix for path in kept.iterdir()) == [".answer", ".json"]
    assert not any(b"PLANTED" in path.read_bytes() for path in kept.iterdir())
    # Another ingress, as after a restart.
    assert call(made_api(gateway, **service), "GET", place, own).status_code == 200
    for path in ("/v1/reports/nothing", "/v1/reports/..%2f..%2fkeys.json", place[:-1]):
        assert call(made_api(gateway, **service), "GET", path, own).status_code == 404


class Held(InProcess):
    """A model that answers when it is let."""

    def __init__(self, inner: InProcess) -> None:
        self.inner, self.let = inner, threading.Event()

    async def report(self, picture: Picture, model: str | None = None) -> DraftReport:
        await asyncio.to_thread(self.let.wait, 60)
        return await self.inner.report(picture, model)


def test_pending_deleted_and_too_many(gateway: InProcess, tmp_path: Path) -> None:
    held = Held(gateway)

    async def use() -> None:
        client = Client(made_api(held, kept={"url": str(tmp_path / "kept"), "max_pending": 2}))
        post = {"headers": LATER, "files": {"file": encoded_film("PNG")}}
        first, second = [(await client("POST", "/v1/reports", **post)).headers["location"] for _ in range(2)]
        over = await client("POST", "/v1/reports", **post)
        assert (over.status_code, over.headers["retry-after"]) == (503, "5")
        assert (await client("GET", first)).status_code == 202
        assert b"ssacl_kept_reports_pending 2.0" in (await client("GET", "/metrics")).content
        assert (await client("DELETE", first)).status_code == 204
        held.let.set()
        assert (await client.settled(second)).status_code == 200
        assert (await client("GET", first)).status_code == 404

    asyncio.run(use())
    # The answer that nobody wanted any more was not kept either.
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_what_an_ingress_left_unfinished_is_told(gateway: InProcess, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    held = Held(gateway)

    async def accept_and_die() -> str:
        answer = await Client(made_api(held, kept={"url": str(kept)}))(
            "POST", "/v1/reports", headers=LATER, files={"file": encoded_film("PNG")}
        )
        return str(answer.headers["location"])

    place = asyncio.run(accept_and_die())
    held.let.set()
    api = made_api(gateway, kept={"url": str(kept)})
    assert call(api, "GET", place).status_code == 202
    state_file = next(kept.glob("*.json"))
    state = JobState.model_validate_json(state_file.read_bytes())
    # As if its time limit had passed meanwhile.
    state_file.write_text(state.model_copy(update={"deadline_at": time.time() - 1}).model_dump_json())
    answer = call(api, "GET", place)
    assert (answer.status_code, answer.json()["status"]) == (200, "failed")
    assert answer.json()["problem"]["type"] == "urn:ssacl:problem:interrupted"
    assert JobState.model_validate_json(state_file.read_bytes()).status == "failed"


def test_expired_answers_are_deleted(gateway: InProcess, tmp_path: Path) -> None:
    kept = KeptReports(KeptSettings(url=str(tmp_path), retention_s=3600), 1.0, lambda _: None)
    over, alive = f"{int(time.time()) - 1:09x}-{'a' * 32}", f"{int(time.time()) + 60:09x}-{'b' * 32}"
    for job in (over, alive):
        (tmp_path / f"{job}.json").write_text(JobState(id=job, client="c", deadline_at=0, status="done").model_dump_json())
        (tmp_path / f"{job}.answer").write_bytes(b"{}")
    (tmp_path / "notes.txt").write_text("somebody else's")
    assert call(made_api(gateway, kept={"url": str(tmp_path)}), "GET", f"/v1/reports/{over}").status_code == 404
    kept.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{alive}.json", f"{alive}.answer", "notes.txt"])


def test_without_storage_every_answer_is_given_at_once(gateway: InProcess) -> None:
    answer = call(made_api(gateway), "POST", "/v1/reports", headers=LATER, files={"file": study_film(1)})
    assert answer.status_code == 200
    assert json.loads(answer.content)["status"] == "preliminary"
    assert call(made_api(gateway), "GET", f"/v1/reports/{'0' * 9}-{'0' * 32}").status_code == 404
