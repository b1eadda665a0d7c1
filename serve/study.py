"""Several images in one request: they must be of one study, and its newest readable frontal film is read."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass

import pydicom

from serve.problems import ProblemError
from serve.schemas import UnusedImage
from ssacl.data.dicom import Picture, RefusedImageError, read_picture
from ssacl.data.dicom_guard import MAX_INFLATED_BYTES, inflates_beyond, is_dicom

_STATUS = {"empty": 400, "too_large": 413, "not_dicom": 415, "not_a_picture": 415}
"""Reason of a refused picture -> HTTP status; 422 for all others: a picture, but not one that can be read as a frontal chest film."""
_TIMES = (
    ("AcquisitionDateTime", None),
    ("AcquisitionDate", "AcquisitionTime"),
    ("ContentDate", "ContentTime"),
    ("SeriesDate", "SeriesTime"),
)
_TAGS = ["StudyInstanceUID", "SOPInstanceUID", *(tag for pair in _TIMES for tag in pair if tag)]


@dataclass(frozen=True)
class _Header:
    study: str = ""
    instance: str = ""
    taken_at: str = ""
    """DICOM date and time, which sort as text; "" where the file names none."""


async def newest_frontal(images: list[bytes]) -> tuple[int, Picture, list[UnusedImage]]:
    """The newest image that can be read as a frontal film, its place in the request, and why the others are unused.

    Images without a date come after those with one, in the order of the request. What comes after the image that was read is not decoded.

    Raises
    ------
    ProblemError
        400, 413, 415 or 422, by the reason of the first refused image, when none can be read; 422 for images of two studies.
    """
    headers = [await asyncio.to_thread(_header, content) for content in images]
    if len({header.study for header in headers if header.study}) > 1:
        detail = "The images are of more than one study. Send a request for each."
        raise ProblemError(422, "several-studies", "The images do not belong together", detail)
    unused: list[UnusedImage] = []
    refusals: dict[int, RefusedImageError] = {}
    chosen: tuple[int, Picture] | None = None
    seen: set[str] = set()
    # Stable: without dates, the order of the request.
    for index in sorted(range(len(images)), key=lambda place: headers[place].taken_at, reverse=True):
        instance = headers[index].instance
        if instance and instance in seen:
            unused.append(
                UnusedImage(index=index, reason="duplicate", detail="Another image of the request has the same SOP Instance UID.")
            )
            continue
        seen.add(instance)
        if chosen is not None:
            unused.append(UnusedImage(index=index, reason="another", detail="Another image of the request was read."))
            continue
        try:
            # In a thread: decoding takes up to a second, and the event loop answers health checks.
            chosen = index, await asyncio.to_thread(read_picture, images[index])
        except RefusedImageError as error:
            refusals[index] = error
            unused.append(UnusedImage(index=index, reason=error.reason, detail=str(error)))
    if chosen is None:
        first = refusals[min(refusals)]
        details = " ".join(dict.fromkeys(str(refusals[index]) for index in sorted(refusals)))
        raise ProblemError(_STATUS.get(first.reason, 422), first.reason, "The image cannot be used", details)
    return *chosen, sorted(unused, key=lambda item: item.index)


def _header(content: bytes) -> _Header:
    """What is needed of a DICOM header; nothing of pictures and damaged files, which are refused when they are read."""
    if not is_dicom(content) or inflates_beyond(content, MAX_INFLATED_BYTES):
        return _Header()
    # pydicom raises whatever it likes on damaged files.
    try:
        ds = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, force=True, specific_tags=_TAGS)
        taken_at = next((text for date, time in _TIMES if (text := str(ds.get(date) or "") + str(ds.get(time or "") or ""))), "")
        return _Header(str(ds.get("StudyInstanceUID") or ""), str(ds.get("SOPInstanceUID") or ""), taken_at)
    except Exception:
        return _Header()
