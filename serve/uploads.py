"""Request body -> pictures. Bounded before it is parsed, kept in memory, and nothing that the client calls it is used."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve.problems import ProblemError
from serve.settings import ServeSettings

RAW_TYPES = ("application/dicom", "image/png", "image/jpeg", "application/octet-stream")
_MAX_FIELDS = 16


class _MemoryParser(MultiPartParser):
    # An upload must not reach the disk of the endpoint: the body is bounded before it is parsed.
    spool_max_size = 2**62


async def read_images(request: Request, settings: ServeSettings) -> list[bytes]:
    """The images of a request, in its order; raw body or multipart field `file`.

    Raises
    ------
    ProblemError
        400 no image or damaged multipart, 413 too large or too many, 415 another content type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data" and kind not in RAW_TYPES:
        expected = "multipart/form-data, " + ", ".join(RAW_TYPES)
        raise ProblemError(415, "content-type", "Content type not accepted", f"Send the image as one of: {expected}.")
    body = await _bounded_body(request, settings.max_upload_bytes)
    images = [body] if kind != "multipart/form-data" else await _parts(request.headers, body, settings)
    images = [image for image in images if image]
    if not images:
        raise ProblemError(
            400, "no-image", "No image in the request", "Send a DICOM, PNG or JPEG file, as the body or as multipart field 'file'."
        )
    return images


async def _bounded_body(request: Request, limit: int) -> bytes:
    too_large = ProblemError(413, "too-large", "The request is too large", f"The endpoint takes at most {limit} bytes per request.")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        parts.append(chunk)
    return b"".join(parts)


async def _parts(headers: Headers, body: bytes, settings: ServeSettings) -> list[bytes]:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    broken = ProblemError(400, "multipart", "The multipart body cannot be read", "Send it as RFC 7578 says, the image in field 'file'.")
    parser = _MemoryParser(headers, once(), max_files=settings.max_files + 1, max_fields=_MAX_FIELDS)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        if "Too many" in str(error):
            raise _too_many(settings) from error
        raise broken from error
    images: list[Any] = [item for name, item in form.multi_items() if name == "file" and isinstance(item, UploadFile)]
    if len(images) > settings.max_files:
        raise _too_many(settings)
    contents = [await image.read() for image in images]
    await form.close()
    return contents


def _too_many(settings: ServeSettings) -> ProblemError:
    return ProblemError(413, "too-many", "Too many parts", f"The endpoint takes at most {settings.max_files} images per request.")
