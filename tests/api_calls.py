"""Calls to the HTTP interface without a server, for tests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from report_endpoint import FAST

from serve.ingress import build_api
from serve.settings import ServeSettings


def made_api(gateway: Any, **service: Any) -> FastAPI:
    """The interface with these access, audit and kept settings."""
    return build_api(gateway, ServeSettings.parse({"checkpoint_url": "unused", "generation": FAST.model_dump(), "service": service}))


def call(
    api: FastAPI, method: str, path: str, key: str | None = None, headers: dict[str, str] | None = None, **keywords: Any
) -> httpx.Response:
    """One request; `key` goes into the Authorization header."""
    given = dict(headers or {}) | ({"authorization": f"Bearer {key}"} if key is not None else {})

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://endpoint") as client:
            return await client.request(method, path, headers=given, **keywords)

    return asyncio.run(send())


def audited(path: Path) -> list[Any]:
    """The records of an audit file, each a valid FHIR AuditEvent."""
    from fhir.resources.R4B.auditevent import AuditEvent

    return [AuditEvent.model_validate_json(line) for line in path.read_text().splitlines()]
