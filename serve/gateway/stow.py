"""STOW-RS (PS3.18 section 10.5): films POSTed to /studies or /studies/{study} go the way of those that come by C-STORE."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from pydicom import Dataset
from starlette.requests import ClientDisconnect

from serve.gateway.config import GatewayConfig, Web
from serve.gateway.intake import OUT_OF_RESOURCES, SUCCESS, Intake, Taken
from serve.gateway.metrics import GatewayMetrics
from serve.gateway.multipart import BrokenBodyError, TooLargeError, media_type, parts_of
from serve.gateway.routing import Caller
from serve.guard import Guard, Operation
from serve.problems import ProblemError
from serve.service_settings import ServiceSettings

OPERATIONS = (Operation("studies.store", "POST", r"/studies(?:/[^/]+)?", "studies:write"),)
_ANSWER = "application/dicom+json"
_ACCEPTED = {_ANSWER, "application/json", "application/*", "*/*"}
_RETRY_AFTER_S = 30


def build_stow_api(config: GatewayConfig, web: Web, intake: Intake, metrics: GatewayMetrics) -> FastAPI:
    """
    Raises
    ------
    ConfigError
        Other machines would be served without access, or a file that is named cannot be used.
    """
    settings = ServiceSettings(access=web.access, audit_file=config.audit_file)
    settings.check_exposure(web.host)
    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    slots = asyncio.Semaphore(web.max_requests)

    @api.post("/studies")
    async def store(request: Request) -> Response:
        return await _store(request, None)

    @api.post("/studies/{study}")
    async def store_in_study(request: Request, study: str) -> Response:
        return await _store(request, study)

    async def _store(request: Request, study: str | None) -> Response:
        boundary = _boundary(request)
        if slots.locked():
            raise ProblemError(503, "busy", "The receiver is busy", "Too many requests at once. Try again later.", _RETRY_AFTER_S)
        caller = Caller(request.state.client.name, "stow-rs", request.client.host if request.client else "")
        taken: list[Taken] = []
        async with slots:
            try:
                async for content in parts_of(
                    _chunks(request, config.limits.network_timeout_s), boundary, config.limits.max_instance_bytes
                ):
                    if len(taken) == web.max_instances:
                        raise TooLargeError
                    taken.append(await asyncio.to_thread(intake.take, content, caller, lambda ds: study in (None, ds.StudyInstanceUID)))
            except (BrokenBodyError, ClientDisconnect, TimeoutError):
                detail = f"It is damaged or ends too early. {_kept(taken)}"
                raise ProblemError(400, "multipart", "The multipart body cannot be read", detail) from None
            except TooLargeError:
                most = f"At most {config.limits.max_instance_bytes} bytes an instance and {web.max_instances} instances a request."
                raise ProblemError(413, "too-large", "The request is too large", f"{most} {_kept(taken)}") from None
        return _answer(taken)

    Guard(settings, OPERATIONS, metrics).install(api)
    return api


def _boundary(request: Request) -> str:
    accepted = {media_type(item)[0] for item in (request.headers.get("accept") or "*/*")[:1000].split(",")}
    if not accepted & _ACCEPTED:
        raise ProblemError(406, "accept", "No such answer type", f"Accept {_ANSWER}.")
    kind, parameters = media_type(request.headers.get("content-type", "")[:1000])
    if kind != "multipart/related" or parameters.get("type", "application/dicom").lower() != "application/dicom":
        raise ProblemError(415, "content-type", "Content type not accepted", 'Send multipart/related; type="application/dicom".')
    if not parameters.get("boundary"):
        raise ProblemError(400, "multipart", "The multipart body cannot be read", "The Content-Type names no boundary.")
    return parameters["boundary"]


async def _chunks(request: Request, limit_s: float) -> AsyncIterator[bytes]:
    """The body; raises `TimeoutError` after silence."""
    stream = request.stream()
    while True:
        async with asyncio.timeout(limit_s):
            try:
                chunk = await anext(stream)
            except StopAsyncIteration:
                return
        yield chunk


def _kept(taken: list[Taken]) -> str:
    """What became of the instances before the fault; sent again, they are known."""
    return f"{sum(item.status == SUCCESS for item in taken)} instances before that were taken; send the request again."


def _answer(taken: list[Taken]) -> Response:
    """The Store Instances Response (PS3.18 section 10.5.3, table I.2-1)."""
    if not taken:
        raise ProblemError(400, "no-instance", "No instance in the request", "Each part is to hold a DICOM file.")
    stored = [item for item in taken if item.status == SUCCESS]
    failed = [item for item in taken if item.status != SUCCESS]
    ds = Dataset()
    ds.RetrieveURL = None
    if stored:
        ds.ReferencedSOPSequence = [_reference(item) for item in stored]
    if named := [item for item in failed if item.sop_instance_uid]:
        ds.FailedSOPSequence = [_reference(item) for item in named]
    if unnamed := [item for item in failed if not item.sop_instance_uid]:
        ds.OtherFailuresSequence = [_reference(item) for item in unnamed]
    is_full = all(item.status == OUT_OF_RESOURCES for item in failed)
    status = 200 if not failed else 202 if stored else 503 if is_full else 409
    headers = {"retry-after": str(_RETRY_AFTER_S)} if status == 503 else {}
    return Response(json.dumps(ds.to_json_dict()), status, headers, media_type=_ANSWER)


def _reference(taken: Taken) -> Dataset:
    ds = Dataset()
    if taken.sop_instance_uid:
        ds.ReferencedSOPClassUID, ds.ReferencedSOPInstanceUID = taken.sop_class_uid, taken.sop_instance_uid
    if taken.status != SUCCESS:
        ds.FailureReason = taken.status
    return ds
