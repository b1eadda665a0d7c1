"""`GET` and `DELETE /v1/reports/{id}`: what became of a request that was accepted with `Prefer: respond-async`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response

from serve.kept import KeptReports
from serve.problems import ProblemError
from serve.schemas import JobResponse

_POLL_S = 2
_Id = Annotated[str, Path(description="From the Location of the 202 answer.")]


def client_name(request: Request) -> str:
    """Whose a kept report is."""
    return str(request.state.client.name)


async def accepted(kept: KeptReports, request: Request, answer: Callable[[], Awaitable[Response]]) -> Response:
    """202 with the place of the answer. Raises `ProblemError` 503 as `KeptReports.accept`."""
    job = await kept.accept(client_name(request), answer, request.state.request_id)
    headers = {"location": f"/v1/reports/{job}", "preference-applied": "respond-async", "retry-after": str(_POLL_S)}
    return _state(JobResponse(id=job, status="running"), 202, headers)


def add_kept_routes(api: FastAPI, kept: KeptReports | None, problems: dict[int | str, dict[str, Any]]) -> None:
    """The routes, with the problems that they may be answered with; without storage there is never a report to find."""

    @api.get(
        "/v1/reports/{job}",
        responses={200: {"model": JobResponse, "description": "The answer in the form asked for at first, or why there is none"}}
        | {202: {"model": JobResponse, "description": "Not answered yet"}}
        | problems,
        summary="A report that was asked for with Prefer: respond-async",
    )
    async def read_report(request: Request, job: _Id) -> Response:
        state, content = await _kept(kept).find(job, client_name(request))
        if state.status == "running":
            return _state(JobResponse(id=job, status="running"), 202, {"retry-after": str(_POLL_S)})
        if state.status == "failed":
            return _state(JobResponse(id=job, status="failed", problem=state.problem), 200, {})
        return Response(content, headers=state.headers)

    @api.delete("/v1/reports/{job}", status_code=204, responses=problems, summary="Delete a kept report now")
    async def delete_report(request: Request, job: _Id) -> Response:
        await _kept(kept).delete(job, client_name(request))
        return Response(status_code=204)


def _kept(kept: KeptReports | None) -> KeptReports:
    if kept is None:
        raise ProblemError(404, "no-report", "There is no such report", "This endpoint keeps no reports; it answers at once.")
    return kept


def _state(state: JobResponse, status: int, headers: dict[str, str]) -> Response:
    return Response(state.model_dump_json(exclude_none=True), status, headers, media_type="application/json")
