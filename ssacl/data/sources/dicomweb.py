"""`--format dicomweb`: studies of a PACS, found by QIDO-RS page by page, each picture fetched by WADO-RS in the task that needs it.

Credentials come from the environment: DICOMWEB_TOKEN (a bearer token), or DICOMWEB_USER and DICOMWEB_PASSWORD. Reports are not
asked for: what is ingested serves the image-only losses.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ssacl.data.quiet import quiet_loggers
from ssacl.data.records import Study, StudyImage
from ssacl.data.refusals import RefusedImageError
from ssacl.data.sources.options import SourceOptions
from ssacl.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from dicomweb_client import DICOMwebClient

PAGE_SIZE = 100
MAX_INSTANCES = 1000
"""Of one study. Radiographs come in ones and twos."""
_TIMEOUT_S = 30.0
_BODY_TIMEOUT_S = 300.0
_MAX_ANSWER_BYTES = 64 << 20
_TOO_LARGE = 413
_MODALITIES = ("CR", "DX", "RG")
_STUDY_UID, _SERIES_UID, _INSTANCE_UID, _PATIENT_ID, _MODALITY, _MODALITIES_IN_STUDY = (
    "0020000D",
    "0020000E",
    "00080018",
    "00100020",
    "00080060",
    "00080061",
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class WadoImage:
    """One instance of a DICOMweb server (an `ssacl.data.records.ImageReader`)."""

    url: str
    study: str
    series: str
    instance: str
    name: str = "instance.dcm"
    size: int = -1

    def read(self, limit: int) -> bytes:
        client, stored = _client(self.url, limit), (("application/dicom", "*"),)
        ds = _asked(self.url, lambda: client.retrieve_instance(self.study, self.series, self.instance, stored), is_picture=True)
        buffer = io.BytesIO()
        try:
            ds.save_as(buffer, enforce_file_format=True)
        except Exception:  # As when the file is read: whatever pydicom raises on a damaged one.
            raise RefusedImageError("unreadable") from None
        return buffer.getvalue()


def query_dicomweb(url: str, options: SourceOptions) -> Iterator[Study]:
    """The radiography studies of a server, in its order, at most `options.max_studies`; the first page is asked for at once.

    Raises
    ------
    ConfigError
        The URL is none, or carries credentials.
    DataError
        No study matches.
    StorageError
        The server cannot be reached, refuses, or does not answer as DICOMweb.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ConfigError("--format dicomweb reads a server: give its http(s) URL up to the prefix, as in https://pacs.example/dicom-web.")
    if parts.username or parts.password:
        raise ConfigError("Take the credentials out of the URL: set DICOMWEB_USER and DICOMWEB_PASSWORD, or DICOMWEB_TOKEN.")
    found = itertools.islice(_studies(url, options.query), options.max_studies)
    first = next(found, None)
    if first is None:
        # The names only: a query may hold a patient's.
        asked = f" that matches {', '.join(options.query)}" if options.query else ""
        raise DataError(f"The server at {url} has no {'/'.join(_MODALITIES)} study{asked}. Check the URL and --query.")
    return (_study(url, uid, patient) for uid, patient in itertools.chain([first], found))


def _studies(url: str, query: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Study and patient of every radiography study, each once."""
    client = _client(url, _MAX_ANSWER_BYTES)
    seen: set[str] = set()
    for offset in itertools.count(0, PAGE_SIZE):
        search = functools.partial(
            client.search_for_studies, limit=PAGE_SIZE, offset=offset, fields=["ModalitiesInStudy"], search_filters=query
        )
        page = _asked(url, search)
        new = [item for item in page if _value(item, _STUDY_UID) not in seen]
        for item in new:
            seen.add(uid := _value(item, _STUDY_UID))
            # Asked for here, not of the server: Orthanc 1.10 loses every page but the first when it filters by modality.
            modalities = item.get(_MODALITIES_IN_STUDY, {}).get("Value") or _MODALITIES
            if uid and set(modalities) & set(_MODALITIES):
                yield uid, _value(item, _PATIENT_ID) or uid
        # A server that knows no offset sends the first page again, for ever.
        if len(page) < PAGE_SIZE or not new:
            return


def _study(url: str, uid: str, patient: str) -> Study:
    client = _client(url, _MAX_ANSWER_BYTES)
    found = _asked(url, lambda: client.search_for_instances(uid, limit=MAX_INSTANCES, fields=["Modality", "SeriesInstanceUID"]))
    radiographs = [item for item in found if _value(item, _MODALITY) in {*_MODALITIES, ""}]
    images = [WadoImage(url, uid, _value(item, _SERIES_UID), _value(item, _INSTANCE_UID)) for item in radiographs]
    images = sorted((image for image in images if image.series and image.instance), key=lambda image: (image.series, image.instance))
    return Study(study_id=uid, patient_id=patient, images=tuple(StudyImage(reader=image) for image in images), source="dicomweb")


def _value(item: dict[str, Any], tag: str) -> str:
    values = item.get(tag, {}).get("Value") or [""]
    return str(values[0])


def _asked(url: str, ask: Callable[[], Result], is_picture: bool = False) -> Result:
    """What the server answers, or a named error that quotes neither its text nor what was asked for."""
    import requests
    from retrying import RetryError

    try:
        return ask()
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if is_picture and status in {404, 410}:
            raise FileNotFoundError from None
        if is_picture and status == _TOO_LARGE:
            raise RefusedImageError("too_large") from None
        hint = (
            "Set DICOMWEB_USER and DICOMWEB_PASSWORD, or DICOMWEB_TOKEN" if status in {401, 403} else "Check the URL and the server's log"
        )
        raise StorageError(f"The DICOMweb server at {url} answers {status}. {hint}, then run again.") from None
    except (requests.RequestException, RetryError, TimeoutError) as error:
        problem = f"cannot be reached ({type(error).__name__})"
    # What the client raises on an answer that is not DICOMweb differs from one damage to the next.
    except Exception:
        if is_picture:
            raise RefusedImageError("unreadable") from None
        problem = "does not answer as DICOMweb"
    raise StorageError(f"The DICOMweb server at {url} {problem}. Check the URL and that it is up, then run again.")


@functools.lru_cache(maxsize=8)
def _client(url: str, limit: int) -> DICOMwebClient:
    import requests
    from dicomweb_client import DICOMwebClient

    # They write the UIDs that they ask for.
    quiet_loggers("dicomweb_client", "urllib3")

    def bounded(response: requests.Response, *_: Any, **__: Any) -> requests.Response:
        # Called before the client reads the body.
        started, body = time.monotonic(), bytearray()
        for block in response.iter_content(1 << 20):
            body += block
            if time.monotonic() - started > _BODY_TIMEOUT_S:
                response.close()
                raise TimeoutError
            if len(body) > limit:
                response.close()
                # Not raised: the client would ask again.
                response.status_code, body = _TOO_LARGE, bytearray()
                break
        response._content = bytes(body)
        return response

    session = requests.Session()
    token, user = os.environ.get("DICOMWEB_TOKEN", ""), os.environ.get("DICOMWEB_USER", "")
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
    elif user:
        session.auth = (user, os.environ.get("DICOMWEB_PASSWORD", ""))
    client = DICOMwebClient(url, session=session, callback=bounded, timeout=_TIMEOUT_S)
    client.set_http_retry_params(max_attempts=4, wait_exponential_multiplier=250)
    return client
