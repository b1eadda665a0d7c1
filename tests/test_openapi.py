"""Requests made up from the OpenAPI (schemathesis): never a 5xx, every answer as it is described, every refusal a problem."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from api_calls import made_api
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from report_endpoint import InProcess
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from tiny_model import encoded_film, tiny_model_folder

from serve.access_keys import add_key
from serve.problems import Problem

FILMS = [encoded_film(kind) for kind in ("DICOM", "PNG", "JPEG")]
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.missing_required_header,
    checks.unsupported_method,
]
schemathesis.openapi.format("binary", st.binary(max_size=300) | st.sampled_from(FILMS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    return InProcess(tiny_model_folder(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def interface(model: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Any:
    api = made_api(model, kept={"url": str(tmp_path_factory.mktemp("kept"))})
    return schemathesis.openapi.from_asgi("/openapi.json", api)


@pytest.fixture(scope="module")
def closed(model: InProcess, tmp_path_factory: pytest.TempPathFactory) -> Any:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    add_key(keys, "pacs", ["reports:write"])
    return schemathesis.openapi.from_asgi("/openapi.json", made_api(model, access={"keys_file": str(keys), "failures_per_minute": 10_000}))


OPERATIONS = [
    ("POST", "/v1/reports"),
    ("GET", "/v1/reports/{job}"),
    ("DELETE", "/v1/reports/{job}"),
    ("GET", "/v1/models"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
]


def test_every_operation_is_tried(interface: Any) -> None:
    described = {(method.upper(), path) for path, methods in interface.raw_schema["paths"].items() for method in methods}
    assert described == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_described(interface: Any, method: str, path: str) -> None:
    statuses = asked(interface, method, path, GenerationMode.POSITIVE)
    assert path != "/v1/reports" or {200, 415} <= statuses


def test_requests_that_are_not_as_described(interface: Any) -> None:
    assert 400 in asked(interface, *OPERATIONS[0], GenerationMode.NEGATIVE)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_without_credentials(interface: Any, closed: Any, method: str, path: str) -> None:
    is_public = path in ("/healthz", "/readyz")
    assert asked(closed, method, path, GenerationMode.POSITIVE) == ({200} if is_public else {401})
    # The description says so where it is so.
    assert ("security" in closed.raw_schema["paths"][path][method.lower()]) == (not is_public)
    assert "security" not in interface.raw_schema["paths"][path][method.lower()]


def asked(interface: Any, method: str, path: str, mode: GenerationMode) -> set[int]:
    """The statuses of requests made up for an operation, each checked."""
    statuses = set()

    @given(case=interface[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=50, derandomize=True, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    def ask(case: schemathesis.Case) -> None:
        answer = case.call()
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)
        if answer.status_code >= 400:
            assert answer.headers["content-type"] == ["application/problem+json"]
            assert Problem.model_validate_json(answer.content).status == answer.status_code

    ask()
    return statuses
