"""RFC 9457 problems: how every refused request ends."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

PROBLEM_TYPE = "application/problem+json"


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class ProblemError(Exception):
    """Ends a request with a problem+json answer. `detail` must hold nothing of the upload."""

    def __init__(self, status: int, kind: str, title: str, detail: str, retry_after_s: int | None = None) -> None:
        super().__init__(title)
        self.status, self.kind, self.title, self.detail, self.retry_after_s = status, kind, title, detail, retry_after_s

    def body(self, request_id: str) -> dict[str, Any]:
        """The problem as a plain tree."""
        kind = f"urn:ssacl:problem:{self.kind}"
        return Problem(type=kind, title=self.title, status=self.status, detail=self.detail, request_id=request_id).model_dump()
