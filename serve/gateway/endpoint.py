"""The HTTP endpoint as the gateway sees it: a film in, its result instances out."""

from __future__ import annotations

import io
import logging
import os
import ssl

import httpx
import pydicom
from pydicom import uid

from serve.gateway.config import Endpoint
from serve.gateway.outcomes import AwayError, FailedError, RefusedError
from ssacl.errors import ConfigError

logger = logging.getLogger(__name__)
RESULTS = (uid.ComprehensiveSRStorage, uid.SecondaryCaptureImageStorage, uid.SegmentationStorage)
_ACCEPT = 'multipart/related; type="application/dicom"'
_MAX_ANSWER_BYTES = 512 << 20
_OF_THE_INSTANCE = (400, 413, 415, 422)


class ReportClient:
    """Raises `ConfigError` where the variable of the Authorization header is not set or the CA file cannot be read."""

    def __init__(self, endpoint: Endpoint) -> None:
        headers = {"accept": _ACCEPT, "content-type": "application/dicom"}
        if endpoint.authorization_env:
            value = os.environ.get(endpoint.authorization_env)
            if not value:
                raise ConfigError(f"The environment variable {endpoint.authorization_env} (endpoint.authorization_env) is not set.")
            headers["authorization"] = value
        try:
            verify = ssl.create_default_context(cafile=endpoint.ca) if endpoint.ca else True
        except OSError as error:
            raise ConfigError("endpoint.ca cannot be read. Give a PEM file.") from error
        timeout = httpx.Timeout(endpoint.timeout_s, connect=10.0)
        self._url = endpoint.url
        # Proxies of the environment are not for a film's way through the hospital.
        self._client = httpx.Client(headers=headers, timeout=timeout, verify=verify, trust_env=False)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def results_of(self, film: bytes, request_id: str) -> list[bytes]:
        """The result instances of a film, DICOM files; the endpoint takes over the request's id.

        Raises
        ------
        AwayError, FailedError, RefusedError
            By what the endpoint answers, or that it does not.
        """
        try:
            with self._client.stream("POST", self._url, content=film, headers={"x-request-id": request_id}) as answer:
                body = _bounded(answer)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            raise AwayError("endpoint_away") from None
        except httpx.HTTPError:
            # It broke off: the endpoint was stopped, or this film stops it.
            raise FailedError("endpoint_broke_off") from None
        if answer.status_code != 200:
            raise _refusal(answer, body)
        return _checked(_parts(body, answer.headers.get("content-type", "")), film)


def _bounded(answer: httpx.Response) -> bytes:
    parts, size = [], 0
    for chunk in answer.iter_bytes():
        size += len(chunk)
        if size > _MAX_ANSWER_BYTES:
            raise FailedError("endpoint_answer_too_long")
        parts.append(chunk)
    return b"".join(parts)


def _refusal(answer: httpx.Response, body: bytes) -> Exception:
    status = answer.status_code
    if status in _OF_THE_INSTANCE:
        return RefusedError(f"endpoint_{_problem(body) or status}")
    if status in (401, 403, 404, 405, 406):
        logger.error("the endpoint answers %d: check endpoint.url and its authorization", status)
        return AwayError(f"endpoint_{status}")
    if status in (429, 502, 503):
        after = answer.headers.get("retry-after", "")
        return AwayError(f"endpoint_{status}", float(after) if after.isdigit() and len(after) < 6 else None)
    return FailedError(f"endpoint_{status}")


def _problem(body: bytes) -> str:
    """The last word of an RFC 9457 problem's type, as the endpoint names its reasons."""
    try:
        kind = str(httpx.Response(200, content=body).json()["type"]).rpartition(":")[2][:40]
    except (ValueError, KeyError, TypeError):
        return ""
    return kind if kind.replace("_", "").replace("-", "").isalnum() else ""


def _parts(body: bytes, content_type: str) -> list[bytes]:
    """The parts of a multipart/related body (RFC 2046 section 5.1)."""
    boundary = next((item.strip()[9:].strip('"') for item in content_type.split(";") if item.strip().startswith("boundary=")), "")
    if not content_type.startswith("multipart/related") or not boundary:
        raise FailedError("endpoint_answer_is_no_dicom")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:-1]
    return [piece.partition(b"\r\n\r\n")[2] for piece in pieces]


def _checked(results: list[bytes], film: bytes) -> list[bytes]:
    """The results, if they are what they must be: ours, and of the film's study."""
    try:
        study = pydicom.dcmread(io.BytesIO(film), stop_before_pixels=True, specific_tags=["StudyInstanceUID"]).StudyInstanceUID
        tags = ["StudyInstanceUID", "SOPClassUID"]
        headers = [pydicom.dcmread(io.BytesIO(result), stop_before_pixels=True, specific_tags=tags) for result in results]
    # pydicom raises whatever it likes; its texts may quote the header.
    except Exception:
        raise FailedError("endpoint_answer_is_no_dicom") from None
    if not results or any(ds.StudyInstanceUID != study or ds.SOPClassUID not in RESULTS for ds in headers):
        raise FailedError("endpoint_answer_is_of_another_study")
    return results
