"""What every request passes: identity, scope, rate, audit, metrics, security headers; and every error becomes problem+json."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serve.access import AccessControl, Client
from serve.audit import AuditLog, Event
from serve.metrics import RequestMetrics
from serve.problems import OverloadedError, ProblemError, problem_of
from serve.service_settings import ServiceSettings
from ssacl.errors import SSACLError

logger = logging.getLogger(__name__)
UNKNOWN = "unknown"
_REQUEST_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""A UUID, as the gateway makes one for each film and Serve's proxy for each request: taken over, so that all their logs name the same."""
_PUBLIC = re.compile(r"/(?:healthz|readyz|openapi\.json|page/[\w.-]{1,80})?")
"""Health, the interface's description and the empty reader page: nothing of anybody."""
_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "strict-transport-security": "max-age=31536000",
}


@dataclass(frozen=True)
class Operation:
    """What clients can do, and the scope that it takes."""

    name: str
    method: str
    path: str
    """Pattern of the whole path."""
    scope: str


class Guard:
    """
    Raises
    ------
    ConfigError
        The file of keys cannot be read, or the audit file not be written.
    """

    def __init__(self, settings: ServiceSettings, operations: tuple[Operation, ...], metrics: RequestMetrics) -> None:
        self.access = AccessControl(settings.access)
        self._metrics = metrics
        self._audit = AuditLog(settings.audit_file) if settings.audit_file else None
        self._operations = [(re.compile(operation.path), operation) for operation in operations]

    def install(self, api: FastAPI) -> None:
        """Put the guard before everything that the API does."""
        api.middleware("http")(self._pass)

        async def failed(request: Request, error: Exception) -> Response:
            return _told(error, request)

        # Not for Exception itself: Starlette logs those with their text before it asks a handler.
        for kind in (ProblemError, OverloadedError, asyncio.TimeoutError, SSACLError, RequestValidationError, HTTPException):
            api.add_exception_handler(kind, failed)

        if self.access.is_on:
            describe = api.openapi
            api.openapi = lambda: self._with_credentials(describe())  # type: ignore[method-assign]

    def _with_credentials(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The interface's description, which says where credentials are needed, and which scope (OpenAPI 3.1: role names)."""
        schemes = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}
        tree.setdefault("components", {})["securitySchemes"] = schemes
        for path, methods in tree["paths"].items():
            for pattern, operation in self._operations:
                if operation.method.lower() in methods and pattern.fullmatch(path):
                    methods[operation.method.lower()]["security"] = [{name: [operation.scope]} for name in schemes]
        return tree

    async def _pass(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("x-request-id", "")
        request_id = request.state.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request.state.client, request.state.objects = None, ()
        started = time.monotonic()
        operation = next(
            (item for path, item in self._operations if item.method == request.method and path.fullmatch(request.url.path)), None
        )
        public = operation is None and request.method in ("GET", "HEAD") and _PUBLIC.fullmatch(request.url.path) is not None
        name = operation.name if operation else "public" if public else UNKNOWN
        try:
            with self._metrics.in_hand.track_inprogress():
                if not public:
                    request.state.client = await self._admit(request, operation)
                response = await call_next(request)
        # What was not foreseen is logged without its text, which may quote the upload.
        except Exception as error:
            response = _told(error, request)
        if not public and self._audit is not None:
            response = await self._recorded(self._audit, request, name, response)
        # Not x-request-id: Serve's proxy answers with its own under that name.
        response.headers["x-ssacl-request-id"] = request_id
        for header, value in _HEADERS.items():
            response.headers.setdefault(header, value)
        seconds = time.monotonic() - started
        self._metrics.count(name, response.status_code, seconds)
        told = {"request_id": request_id}
        logger.info("request %s: %s %d in %.3f s", request_id, name, response.status_code, seconds, extra=told)
        return response

    async def _admit(self, request: Request, operation: Operation | None) -> Client:
        headers = request.headers
        # In a thread: a token may need its provider's keys read.
        client = await asyncio.to_thread(
            self.access.client_of, headers.get("authorization", ""), headers.get("x-api-key", ""), _address(request)
        )
        request.state.client = client
        if operation is not None:
            self.access.check_scope(client, operation.scope)
        return client

    @staticmethod
    async def _recorded(audit: AuditLog, request: Request, operation: str, response: Response) -> Response:
        client: Client | None = request.state.client
        event = Event.of_request(
            client.name if client else "",
            _address(request),
            operation,
            request.method,
            response.status_code,
            request.state.request_id,
            tuple(request.state.objects),
        )
        try:
            await asyncio.to_thread(audit.record, event)
        except OSError as error:
            logger.error("the audit record cannot be written (%s): the answer is withheld", type(error).__name__)
            return ProblemError(503, "audit", "The request cannot be recorded", "Tell the operator, then try again.", 30).answer(
                request.state.request_id
            )
        return response


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _told(error: Exception, request: Request) -> Response:
    request_id = request.state.request_id
    if isinstance(error, RequestValidationError):
        names = ", ".join(sorted({str(item["loc"][-1]) for item in error.errors() if item["loc"][0] == "query"}))
        error = ProblemError(400, "query", "A query parameter is not valid", f"See /openapi.json for: {names or 'the request'}.")
    elif isinstance(error, HTTPException):
        titles = {404: "There is nothing at this path", 405: "Method not allowed here"}
        title = titles.get(error.status_code, "The request cannot be served")
        detail = "See /openapi.json for what the endpoint offers."
        error = ProblemError(error.status_code, "http", title, detail, headers=dict(error.headers or {}))
    problem = problem_of(error)
    if problem is not error and problem.status in (500, 503) and not isinstance(error, OverloadedError):
        logger.error("request %s failed: %s", request_id, type(error).__name__)
    return problem.answer(request_id)
