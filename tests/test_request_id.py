"""One request id through the logs of gateway, Serve's ingress and model replica."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import httpx
import pytest
import ray
from api_calls import call, made_api
from dicom_nodes import Archive, free_port, gateway_config, running_archive, send, study_film, until
from report_endpoint import FAST, InProcess
from tiny_model import encoded_film, tiny_model_folder

from serve.app import run_server
from serve.gateway.service import Gateway
from serve.gateway.spool import read_status
from serve.settings import ServeSettings
from ssacl.log_format import JsonLines

UUID = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize("given", [UUID, "01234567-89ab-cdef-0123-456789abcdef"])
def test_a_well_formed_id_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str) -> None:
    api = made_api(InProcess(tiny_model_folder(tmp_path / "model")))
    with caplog.at_level(logging.INFO):
        answer = call(api, "POST", "/v1/reports", headers={"x-request-id": given}, files={"file": encoded_film("PNG")})
    assert answer.headers["x-ssacl-request-id"] == answer.json()["request_id"] == given
    record = next(record for record in caplog.records if given in record.getMessage())
    assert json.loads(JsonLines().format(record))["request_id"] == given


@pytest.mark.parametrize("given", ["", "DOE-JOHN-1955", UUID.upper(), UUID[:-1], UUID + "0", "x" * 5000, f"{UUID} {UUID}", "../../etc"])
def test_another_id_is_not(given: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answer = call(made_api(None), "GET", "/healthz", headers={"x-request-id": given})
    made = answer.headers["x-ssacl-request-id"]
    assert len(made) == 32
    assert made != given
    assert not given or given not in caplog.text


def logged(folder: Path, part: str, request_id: str) -> list[str]:
    """What Serve's logs whose name holds `part` say of a request: each line has its id before the message."""
    lines = [line for path in folder.glob("*.log") if part in path.name for line in path.read_text().splitlines()]
    return [line.split(f" {request_id} -- ")[1] for line in lines if f" {request_id} -- " in line]


@pytest.mark.ray
@pytest.mark.slow
def test_gateway_ingress_and_replica_name_the_same_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ServeSettings(checkpoint_url=str(tiny_model_folder(tmp_path / "model")), port=0, generation=FAST)
    archive_port, spool = free_port(), tmp_path / "spool"
    with caplog.at_level(logging.INFO), run_server(settings, blocking=False) as server, running_archive(Archive(), archive_port):
        logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
        config = gateway_config(spool, 1, archive_port, endpoint={"url": f"{server.url}/v1/reports"})
        with Gateway(config) as gateway:
            assert send(gateway.port, study_film(1)) == [0]
            until(lambda: read_status(spool)["done"] == {"reported": 1})
        # Of a request that names none, Serve's proxy makes the id.
        other = httpx.get(f"{server.url}/v1/models", timeout=60).headers
        lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name.startswith("serve.gateway")]
        accepted = next(line for line in lines if " accepted from SENDER" in line["message"])
        request_id = accepted["request_id"]
        told = [line["message"].split(" ")[-1] for line in lines if line.get("request_id") == request_id]
        assert told[-2:] == ["reported", "delivered"]
        until(lambda: logged(logs, "model", other["x-request-id"]))
        assert any(line.startswith(f"request {request_id}: report.create 200") for line in logged(logs, "ingress", request_id))
        assert any(line.startswith("CALL report OK") for line in logged(logs, "model", request_id))
        assert any(line.startswith("POST /v1/reports 200") for line in logged(logs, "proxy", request_id))
        assert other["x-ssacl-request-id"] == other["x-request-id"]
        text = caplog.text + "".join(path.read_text(errors="replace") for path in logs.iterdir() if path.is_file())
    assert [hidden for hidden in ("PLANTED", "1.2.840.99") if hidden in text] == []
