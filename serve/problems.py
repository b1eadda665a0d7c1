"""RFC 9457 problems: how every refused request ends."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from ssacl.errors import ConfigError, GenerationError, SSACLError
from ssacl.inference.options import TimeLimitError

PROBLEM_TYPE = "application/problem+json"
_RETRY_AFTER_S = 5


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class ProblemError(Exception):
    """Ends a request with a problem+json answer. `detail` must hold nothing of the upload."""

    def __init__(
        self,
        status: int,
        kind: str,
        title: str,
        detail: str,
        retry_after_s: int | None = None,
        *,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(title)
        self.status, self.kind, self.title, self.detail, self.retry_after_s = status, kind, title, detail, retry_after_s
        self.headers = dict(headers or {}) | ({"retry-after": str(retry_after_s)} if retry_after_s else {})

    def body(self, request_id: str) -> dict[str, Any]:
        """The problem as a plain tree."""
        kind = f"urn:ssacl:problem:{self.kind}"
        return Problem(type=kind, title=self.title, status=self.status, detail=self.detail, request_id=request_id).model_dump()

    def answer(self, request_id: str) -> JSONResponse:
        """The problem as an HTTP answer."""
        return JSONResponse(self.body(request_id), self.status, self.headers, media_type=PROBLEM_TYPE)


class OverloadedError(Exception):
    """Every model replica is busy and the queue is full."""


def problem_of(error: Exception) -> ProblemError:
    """What a client is told of an error; nothing of its text where it may quote the upload or name the inside of the endpoint."""
    match error:
        case ProblemError():
            return error
        case OverloadedError():
            return ProblemError(503, "overloaded", "The endpoint is busy", "Every model replica is busy. Try again later.", _RETRY_AFTER_S)
        case asyncio.TimeoutError() | TimeLimitError():
            detail = "The time limit was reached. Try again later."
            return ProblemError(504, "time-limit", "The report took too long", detail, _RETRY_AFTER_S)
        case GenerationError():
            return ProblemError(503, "generation", "No report can be written", str(error))
        case ConfigError():
            return ProblemError(400, "query", "The request asks for something that is not there", str(error))
        case SSACLError():
            return not_ready()
        case _:
            return ProblemError(500, "internal", "Internal error", "Report the request id to the operator.")


def not_ready() -> ProblemError:
    """No replica has a model."""
    return ProblemError(503, "not-ready", "No model is ready", "The model is loading or has failed. Try again later.", _RETRY_AFTER_S)
