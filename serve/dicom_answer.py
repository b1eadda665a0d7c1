"""The DICOM form of a report: its result instances as multipart/related, as DICOMweb sends instances (PS3.18 section 8.6.1.2)."""

from __future__ import annotations

import secrets
from datetime import datetime

from fastapi import Response

from serve.problems import ProblemError
from ssacl.data.dicom import Picture
from ssacl.errors import DataError
from ssacl.inference.dicom_results import Source, dicom_results
from ssacl.inference.report import DraftReport


def read_source(content: bytes) -> Source:
    """
    Raises
    ------
    ProblemError
        422: the image is no DICOM film that results could refer to.
    """
    try:
        return Source.read(content)
    except DataError as error:
        raise ProblemError(422, "no-dicom-results", "No DICOM results can be made for this image", str(error)) from error


def dicom_answer(source: Source, picture: Picture, report: DraftReport) -> Response:
    """Structured Report, overlay and segmentation, a part each."""
    boundary = secrets.token_hex(16)
    head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    parts = [head + result.encoded() + b"\r\n" for result in dicom_results(source, picture, report, datetime.now())]
    body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    return Response(body, headers={"content-type": f'multipart/related; type="application/dicom"; boundary={boundary}'})
