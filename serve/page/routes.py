"""The reader page: its few files, read once, each at a path of its own. No path of a request is ever opened."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

_FILES = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE_HEADERS = {
    # Nothing from elsewhere, nothing inline, nothing sent elsewhere, not shown inside another page, and no text is ever taken for markup.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), browsing-topics=()",
}


def add_page(api: FastAPI) -> None:
    """`GET /` and the files it loads, below `/page/`. Addresses inside are relative, so a proxy may put all of it below a path."""
    for path in sorted(_FILES.iterdir()):
        if path.suffix in _TYPES:
            _add_file(api, "/" if path.name == "index.html" else f"/page/{path.name}", path.read_bytes(), _TYPES[path.suffix])


def _add_file(api: FastAPI, at: str, content: bytes, media_type: str) -> None:
    async def page_file(request: Request) -> Response:
        return Response(content, headers=PAGE_HEADERS, media_type=media_type)

    # A plain route: it answers HEAD as well, and is no part of the OpenAPI.
    api.add_route(at, page_file, include_in_schema=False)
