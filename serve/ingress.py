"""The HTTP interface as a FastAPI application over any `ModelGateway`; knows nothing of Ray."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal, Protocol

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import PlainTextResponse

import ssacl
from serve.dicom_answer import dicom_answer, read_source
from serve.fhir_answer import fhir_answer
from serve.film_answer import film_answer
from serve.guard import Guard, Operation
from serve.kept import KeptReports
from serve.kept_routes import accepted, add_kept_routes
from serve.metrics import MEDIA_TYPE, EndpointMetrics
from serve.negotiation import answer_type, prefers_async
from serve.page.routes import add_page
from serve.problems import PROBLEM_TYPE, Problem, ProblemError, not_ready
from serve.schemas import HealthResponse, JobResponse, ModelsResponse, ReportResponse
from serve.settings import ServeSettings
from serve.study import newest_frontal
from serve.uploads import RAW_TYPES, read_images
from ssacl.anatomy import NODES
from ssacl.data.dicom import Picture
from ssacl.inference.evidence import evidence_sheet_png, overlay_png
from ssacl.inference.report import DISCLAIMER, DraftReport

OPERATIONS = (
    Operation("report.create", "POST", "/v1/reports", "reports:write"),
    Operation("report.read", "GET", "/v1/reports/[^/]+", "reports:read"),
    Operation("report.delete", "DELETE", "/v1/reports/[^/]+", "reports:write"),
    Operation("models.read", "GET", "/v1/models", "models:read"),
    Operation("metrics.read", "GET", "/metrics", "metrics:read"),
)


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
            (401, "No valid credentials"),
            (403, "The credentials do not hold the scope"),
            (404, "No such report"),
            (406, "Another answer type asked for"),
            (413, "Too large"),
            (415, "Not a DICOM, PNG or JPEG file"),
            (422, "The image cannot be read"),
            (429, "Too many requests"),
            (503, "Busy, or no model ready"),
            (504, "Time limit"),
        )
    }
    # Any operation that is not public may be answered so before it begins.
    guarded = {status: problems[status] for status in (401, 403, 429, 503)}
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"file": {"type": "array", "items": binary}}, "required": ["file"]}
    body = {"required": True, "content": {"multipart/form-data": {"schema": form}} | {kind: {"schema": binary} for kind in RAW_TYPES}}
    other = {
        "image/png": {"schema": binary},
        "multipart/related": {"schema": binary},
        "application/fhir+json": {"schema": {"type": "object"}},
    }
    ok = {"model": ReportResponse, "content": other, "description": "The draft, a picture of its evidence, or its DICOM instances"}
    later = {"model": JobResponse, "description": "Accepted (Prefer: respond-async); Location says where the answer will be"}
    figures = EndpointMetrics()
    guard = Guard(settings.service, OPERATIONS, figures)
    kept = KeptReports(settings.service.kept, settings.request_timeout_s, figures.pending.set) if settings.service.kept.url else None

    @api.post(
        "/v1/reports", responses={200: ok, 202: later, **problems}, openapi_extra={"requestBody": body}, summary="Draft report of one study"
    )
    async def create_report(
        request: Request,
        picture: Annotated[Literal["sheet", "overlay"], Query(description="With Accept: image/png: which picture.")] = "sheet",
        sentence: Annotated[int | None, Query(ge=0, description="Overlay: this sentence's map.")] = None,
        node: Annotated[
            str | None, Query(max_length=40, description="Overlay: this anatomy node's map.", json_schema_extra={"enum": [*NODES, None]})
        ] = None,
        maps: Annotated[bool, Query(description="JSON: hold the evidence maps.")] = True,
        film: Annotated[bool, Query(description="JSON: hold the film as it is shown, a PNG in base64.")] = False,
        model: Annotated[str | None, Query(max_length=64, description="A model of GET /v1/models by name; the first without it.")] = None,
    ) -> Response:
        asked = answer_type(request.headers.get("accept", "*/*"))
        if node is not None and node not in NODES:
            raise ProblemError(400, "query", "Unknown anatomy node", f"Nodes: {', '.join(NODES)}.")
        images = await read_images(request, settings)
        index, image, unused = await newest_frontal(images)
        source = await asyncio.to_thread(read_source, images[index]) if asked.kind == "multipart/related" else None
        del images
        # A content hash names nobody, and tells whether the same film was read before.
        request.state.objects = (image.pixel_digest,)

        async def answer() -> Response:
            report = await asyncio.wait_for(gateway.report(image, model), settings.request_timeout_s)
            if source is not None:
                return await asyncio.to_thread(dicom_answer, source, image, report)
            if asked.kind == "image/png":
                png = await asyncio.to_thread(_draw, image, report, picture, sentence, node)
                return Response(png, media_type="image/png", headers={"x-image-index": str(index)})
            if asked.kind == "application/fhir+json":
                bundle = await asyncio.to_thread(fhir_answer, report, request.state.request_id, asked.fhir_version)
                return Response(bundle, headers={"content-type": f"application/fhir+json; fhirVersion={asked.fhir_version}"})
            tree = report.to_json()
            if not maps:
                tree["anatomy_maps"] = None
                tree["sentences"] = [{**item, "evidence": None} for item in tree["sentences"]]
            tree["film"] = (await asyncio.to_thread(film_answer, image)).model_dump() if film else None
            tree |= {"request_id": request.state.request_id, "image_index": index, "unused": [item.model_dump() for item in unused]}
            return Response(json.dumps(tree, allow_nan=False), media_type="application/json")

        if kept is not None and prefers_async(request.headers.get("prefer", "")):
            return await accepted(kept, request, answer)
        return await answer()

    add_kept_routes(api, kept, {404: problems[404], **guarded})

    @api.get("/v1/models", responses=guarded, summary="Models that this endpoint answers with")
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
            raise not_ready() from error
        return HealthResponse(status="ready")

    @api.get("/metrics", responses=guarded, response_class=PlainTextResponse, summary="Figures of this ingress replica for Prometheus")
    async def metrics() -> Response:
        return Response(figures.text(), headers={"content-type": MEDIA_TYPE})

    add_page(api)
    guard.install(api)
    return api


def _draw(image: Picture, report: DraftReport, picture: str, sentence: int | None, node: str | None) -> bytes:
    if picture == "overlay" or sentence is not None or node is not None:
        return overlay_png(image.pixels, report, sentence_index=sentence, node=node)
    return evidence_sheet_png(image.pixels, report)
