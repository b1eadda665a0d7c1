"""The HTTP interface as a FastAPI application over any `ModelGateway`; knows nothing of Ray."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import ssacl
from serve.dicom_answer import dicom_answer, read_source
from serve.film_answer import film_answer
from serve.page.routes import add_page
from serve.problems import PROBLEM_TYPE, Problem, ProblemError
from serve.schemas import HealthResponse, ModelsResponse, ReportResponse
from serve.settings import ServeSettings
from serve.uploads import RAW_TYPES, first_frontal, read_images
from ssacl.anatomy import NODES
from ssacl.data.dicom import Picture
from ssacl.errors import ConfigError, GenerationError, SSACLError
from ssacl.inference.evidence import evidence_sheet_png, overlay_png
from ssacl.inference.generator import TimeLimitError
from ssacl.inference.report import DISCLAIMER, DraftReport

logger = logging.getLogger(__name__)
_RETRY_AFTER_S = 5


class OverloadedError(Exception):
    """Every model replica is busy and the queue is full."""


class ModelGateway(Protocol):
    """How the interface reaches a model."""

    async def report(self, picture: Picture, model: str | None = None) -> DraftReport:
        """By the first or a named model; raises `OverloadedError` or an `SSACLError`."""
        ...

    async def describe(self) -> dict[str, Any]:
        """Version and provenance of the first model; raises where no model is ready."""
        ...

    async def describe_all(self) -> list[dict[str, Any]]:
        """The same of every model, with its name."""
        ...


def build_api(gateway: ModelGateway, settings: ServeSettings) -> FastAPI:
    """The application: `POST /v1/reports`, `GET /v1/models`, `/healthz`, `/readyz`, and its OpenAPI."""
    description = f"Draft chest X-ray reports with evidence. {DISCLAIMER}"
    api = FastAPI(title="ssacl", version=ssacl.__version__, description=description, docs_url=None, redoc_url=None)
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "content": {PROBLEM_TYPE: {}}, "description": text}
        for status, text in (
            (400, "No image, or a damaged body"),
            (406, "Another answer type asked for"),
            (413, "Too large"),
            (415, "Not a DICOM, PNG or JPEG file"),
            (422, "The image cannot be read"),
            (503, "Busy, or no model ready"),
            (504, "Time limit"),
        )
    }
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"file": {"type": "array", "items": binary}}, "required": ["file"]}
    body = {"required": True, "content": {"multipart/form-data": {"schema": form}} | {kind: {"schema": binary} for kind in RAW_TYPES}}
    other = {"image/png": {"schema": binary}, "multipart/related": {"schema": binary}}
    ok = {"model": ReportResponse, "content": other, "description": "The draft, a picture of its evidence, or its DICOM instances"}

    @api.post("/v1/reports", responses={200: ok, **problems}, openapi_extra={"requestBody": body}, summary="Draft report of one study")
    async def create_report(
        request: Request,
        picture: Annotated[Literal["sheet", "overlay"], Query(description="With Accept: image/png: which picture.")] = "sheet",
        sentence: Annotated[int | None, Query(ge=0, description="Overlay: this sentence's map.")] = None,
        node: Annotated[str | None, Query(max_length=40, description="Overlay: this anatomy node's map.")] = None,
        maps: Annotated[bool, Query(description="JSON: hold the evidence maps.")] = True,
        film: Annotated[bool, Query(description="JSON: hold the film as it is shown, a PNG in base64.")] = False,
        model: Annotated[str | None, Query(max_length=64, description="A model of GET /v1/models by name; the first without it.")] = None,
    ) -> Response:
        kind = _answer_type(request.headers.get("accept", "*/*"))
        if node is not None and node not in NODES:
            raise ProblemError(400, "query", "Unknown anatomy node", f"Nodes: {', '.join(NODES)}.")
        images = await read_images(request, settings)
        index, image, unused = await first_frontal(images)
        source = await asyncio.to_thread(read_source, images[index]) if kind == "multipart/related" else None
        del images
        report = await asyncio.wait_for(gateway.report(image, model), settings.request_timeout_s)
        if source is not None:
            return await asyncio.to_thread(dicom_answer, source, image, report)
        if kind == "image/png":
            png = await asyncio.to_thread(_draw, image, report, picture, sentence, node)
            return Response(png, media_type="image/png", headers={"x-image-index": str(index)})
        tree = report.to_json()
        if not maps:
            tree["anatomy_maps"] = None
            tree["sentences"] = [{**item, "evidence": None} for item in tree["sentences"]]
        tree["film"] = (await asyncio.to_thread(film_answer, image)).model_dump() if film else None
        tree |= {"request_id": request.state.request_id, "image_index": index, "unused": [item.model_dump() for item in unused]}
        return Response(json.dumps(tree, allow_nan=False), media_type="application/json")

    @api.get("/v1/models", responses={503: problems[503]}, summary="Models that this endpoint answers with")
    async def models() -> ModelsResponse:
        return ModelsResponse(models=await asyncio.wait_for(gateway.describe_all(), 30))

    @api.get("/healthz", summary="The process answers")
    async def healthz() -> HealthResponse:
        return HealthResponse(status="ok")

    @api.get("/readyz", responses={503: problems[503]}, summary="A model is loaded and answers")
    async def readyz() -> HealthResponse:
        try:
            await asyncio.wait_for(gateway.describe(), 5)
        except Exception as error:
            raise _not_ready() from error
        return HealthResponse(status="ready")

    add_page(api)
    _install_problems(api)
    return api


def _install_problems(api: FastAPI) -> None:
    """Every error becomes problem+json; what was not foreseen is logged without its text, which may quote the upload."""

    @api.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        request_id = request.state.request_id = uuid.uuid4().hex
        started = time.monotonic()
        try:
            response = await call_next(request)
        except Exception as error:
            logger.error("request %s failed: %s", request_id, type(error).__name__)
            response = _answer(ProblemError(500, "internal", "Internal error", "Report the request id to the operator."), request)
        # Not x-request-id: Serve's proxy answers with its own under that name.
        response.headers["x-ssacl-request-id"] = request_id
        response.headers["cache-control"] = "no-store"
        response.headers["x-content-type-options"] = "nosniff"
        logger.info("request %s: %d in %.3f s", request_id, response.status_code, time.monotonic() - started)
        return response

    @api.exception_handler(ProblemError)
    async def problem(request: Request, error: ProblemError) -> Response:
        return _answer(error, request)

    @api.exception_handler(OverloadedError)
    async def overloaded(request: Request, _: OverloadedError) -> Response:
        detail = "Every model replica is busy. Try again later."
        return _answer(ProblemError(503, "overloaded", "The endpoint is busy", detail, _RETRY_AFTER_S), request)

    @api.exception_handler(asyncio.TimeoutError)
    async def timeout(request: Request, _: asyncio.TimeoutError) -> Response:
        return _answer(_too_slow(), request)

    @api.exception_handler(GenerationError)
    async def generation(request: Request, error: GenerationError) -> Response:
        return _answer(
            _too_slow() if isinstance(error, TimeLimitError) else ProblemError(503, "generation", "No report can be written", str(error)),
            request,
        )

    @api.exception_handler(ConfigError)
    async def bad_query(request: Request, error: ConfigError) -> Response:
        return _answer(ProblemError(400, "query", "The request asks for something that is not there", str(error)), request)

    @api.exception_handler(SSACLError)
    async def not_ready(request: Request, error: SSACLError) -> Response:
        logger.error("request %s failed: %s", request.state.request_id, type(error).__name__)
        return _answer(_not_ready(), request)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        names = ", ".join(sorted({str(item["loc"][-1]) for item in error.errors() if item["loc"][0] == "query"}))
        return _answer(
            ProblemError(400, "query", "A query parameter is not valid", f"See /openapi.json for: {names or 'the request'}."), request
        )

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        titles = {404: "There is nothing at this path", 405: "Method not allowed here"}
        title = titles.get(error.status_code, "The request cannot be served")
        return _answer(ProblemError(error.status_code, "http", title, "See /openapi.json for what the endpoint offers."), request)


def _answer(problem: ProblemError, request: Request) -> JSONResponse:
    headers = {"retry-after": str(problem.retry_after_s)} if problem.retry_after_s else None
    return JSONResponse(problem.body(request.state.request_id), problem.status, headers, media_type=PROBLEM_TYPE)


def _answer_type(accept: str) -> str:
    """The first acceptable type by quality; JSON where the client does not care."""
    offers: list[tuple[float, str]] = []
    for part in accept[:1000].split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        offers.append((float(quality) if quality.replace(".", "", 1).isdigit() else 0.0, kind))
    for quality, kind in sorted(offers, key=lambda offer: -offer[0]):
        if quality > 0 and kind in ("image/png", "image/*"):
            return "image/png"
        if quality > 0 and kind in ("multipart/related", "application/dicom"):
            return "multipart/related"
        if quality > 0 and kind in ("application/json", "application/*", "*/*", ""):
            return "application/json"
    raise ProblemError(406, "accept", "No such answer type", "Accept application/json, image/png or application/dicom.")


def _draw(image: Picture, report: DraftReport, picture: str, sentence: int | None, node: str | None) -> bytes:
    if picture == "overlay" or sentence is not None or node is not None:
        return overlay_png(image.pixels, report, sentence_index=sentence, node=node)
    return evidence_sheet_png(image.pixels, report)


def _too_slow() -> ProblemError:
    return ProblemError(504, "time-limit", "The report took too long", "The time limit was reached. Try again later.", _RETRY_AFTER_S)


def _not_ready() -> ProblemError:
    return ProblemError(503, "not-ready", "No model is ready", "The model is loading or has failed. Try again later.", _RETRY_AFTER_S)
