"""The STOW-RS receiver over real HTTP: what is stored, what is refused with which status, and who may store."""

from __future__ import annotations

import json
import resource
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pydicom
import pytest
from api_calls import audited
from dicom_files import dicom, film
from dicom_nodes import free_port, gateway_config, made_certificate, study_film
from dicomweb_client import DICOMwebClient
from hostile_uploads import PLANTED, hostile_uploads
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from serve.access_keys import add_key
from serve.gateway.service import Gateway
from serve.gateway.spool import key_of, read_status
from ssacl.errors import ConfigError, ServeError

DICOM = 'multipart/related; type="application/dicom"; boundary=b'
SR = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.33", "Modality": "SR", "PixelData": None, "Rows": None}


def body(*parts: bytes, end: bytes = b"\r\n--b--\r\n") -> bytes:
    return b"".join(b"\r\n--b\r\nContent-Type: application/dicom\r\n\r\n" + part for part in parts) + end


@contextmanager
def receiver(folder: Path, **changes: Any) -> Iterator[tuple[Gateway, httpx.Client]]:
    """A gateway whose endpoint and archive are away, so that what it takes waits; and a client of it."""
    web = {"port": 0, **changes.pop("web", {})}
    with (
        Gateway(gateway_config(folder / "spool", free_port(), free_port(), web=web, **changes)) as gateway,
        httpx.Client(base_url=f"http://127.0.0.1:{gateway.web_port}", timeout=30, trust_env=False) as client,
    ):
        yield gateway, client


def post(client: httpx.Client, content: Any, kind: str = DICOM, path: str = "/studies", **headers: str) -> httpx.Response:
    return client.post(path, content=content, headers={"content-type": kind, **headers})


def reasons(answer: httpx.Response) -> dict[str, list[Any]]:
    """Name of each sequence -> UIDs of what was stored, failure reasons of what was not."""
    assert answer.headers["content-type"] == "application/dicom+json"
    ds = pydicom.Dataset.from_json(answer.json())
    found = {"stored": [str(item.ReferencedSOPInstanceUID) for item in ds.get("ReferencedSOPSequence", [])]}
    for name in ("FailedSOPSequence", "OtherFailuresSequence"):
        found[name] = [item.FailureReason for item in ds.get(name, [])]
    return {name: values for name, values in found.items() if values}


def waiting(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "spool" / "waiting").iterdir())


def test_what_is_answered_as_stored_is_on_the_disk(tmp_path: Path) -> None:
    films = [study_film(1), study_film(2, syntax=RLELossless), study_film(3, ViewPosition="LL")]
    with receiver(tmp_path) as (_, client):
        web = DICOMwebClient(str(client.base_url))
        answer = web.store_instances([pydicom.dcmread(pydicom.filebase.DicomBytesIO(content)) for content in films])
        uids = [f"1.2.840.99.{number}.1.1" for number in (1, 2, 3)]
        assert [item.ReferencedSOPInstanceUID for item in answer.ReferencedSOPSequence] == uids
        assert "FailedSOPSequence" not in answer
        # The lateral is taken and passed by rule; sent again, all are known.
        assert waiting(tmp_path) == sorted(map(key_of, uids[:2]))
        assert reasons(post(client, body(*films))) == {"stored": uids}
        assert read_status(tmp_path / "spool")["done"] == {"passed lateral": 1}
        web.store_instances([pydicom.dcmread(pydicom.filebase.DicomBytesIO(study_film(4)))], study_instance_uid="1.2.840.99.4")
    assert len(waiting(tmp_path)) == 3


def test_a_body_in_the_smallest_chunks(tmp_path: Path) -> None:
    whole = body(study_film(1), study_film(2))
    with receiver(tmp_path) as (_, client):
        answer = post(client, (whole[place : place + 7] for place in range(0, len(whole), 7)))
    assert answer.status_code == 200
    for number in (1, 2):
        kept = tmp_path / "spool" / "waiting" / key_of(f"1.2.840.99.{number}.1.1") / "film.dcm"
        assert kept.read_bytes() == study_film(number)


@pytest.mark.parametrize(
    ("content", "status", "told"),
    [
        (study_film(1, **SR), 409, {"FailedSOPSequence": [0x0122]}),
        (study_film(1, SOPClassUID="1.2.840.10008.5.1.4.1.1.2", Modality="CT"), 409, {"FailedSOPSequence": [0x0122]}),
        (study_film(1, BodyPartExamined="KNEE"), 409, {"FailedSOPSequence": [0x0124]}),
        (b"no DICOM at all", 409, {"OtherFailuresSequence": [0xC000]}),
        (b"", 409, {"OtherFailuresSequence": [0xC000]}),
        (study_film(1)[:300], 409, {"OtherFailuresSequence": [0xC000]}),
        (study_film(1, StudyInstanceUID=""), 409, {"OtherFailuresSequence": [0xC000]}),
        (study_film(1, SOPInstanceUID="1.PLANTED"), 409, {"OtherFailuresSequence": [0xC000]}),
        (dicom(film(), syntax=DeflatedExplicitVRLittleEndian), 409, {"OtherFailuresSequence": [0xC122]}),
    ],
    ids=["SR", "CT", "refused by rule", "text", "nothing", "cut", "no study", "no identifier", "deflated"],
)
def test_what_is_no_film_fails_alone(tmp_path: Path, content: bytes, status: int, told: dict[str, list[int]]) -> None:
    rules = [{"subject": ["not_chest"], "action": "refuse"}, {"action": "report"}]
    with receiver(tmp_path, rules=rules) as (_, client):
        alone = post(client, body(content))
        assert (alone.status_code, reasons(alone)) == (status, told)
        assert waiting(tmp_path) == []
        beside = post(client, body(content, study_film(9)))
        assert (beside.status_code, reasons(beside)) == (202, {"stored": ["1.2.840.99.9.1.1"], **told})
    assert waiting(tmp_path) == [key_of("1.2.840.99.9.1.1")]
    assert list((tmp_path / "spool" / "incoming").iterdir()) == []


@pytest.mark.slow
def test_hostile_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [content for _, kind, content in hostile_uploads() if not kind.startswith("multipart")]
    # Whatever the rules make of them, none may stop the receiver.
    changes = {"rules": [{"action": "report"}], "audit_file": str(tmp_path / "audit.jsonl")}
    with caplog.at_level("DEBUG"), receiver(tmp_path, **changes) as (_, client):
        for content in files:
            started = time.monotonic()
            answer = post(client, body(content))
            assert answer.status_code in (200, 409)
            assert len(reasons(answer)) == 1
            assert [0x0110] not in reasons(answer).values()
            assert time.monotonic() - started < 10
        assert post(client, body(study_film(1))).status_code == 200
    told = caplog.text + (tmp_path / "audit.jsonl").read_text() + " ".join(path.name for path in tmp_path.rglob("*"))
    assert [hidden for hidden in (*PLANTED, "passwd", "Traceback") if hidden in told] == []


def test_our_own_results_are_passed(tmp_path: Path) -> None:
    own = study_film(1, **SR, Manufacturer="ssacl", ManufacturerModelName="ssacl")
    with receiver(tmp_path) as (_, client):
        assert post(client, body(own)).status_code == 200
    assert read_status(tmp_path / "spool")["done"] == {"passed own_result": 1}


def test_another_study_than_the_path_says(tmp_path: Path) -> None:
    with receiver(tmp_path) as (_, client):
        answer = post(client, body(study_film(1)), path="/studies/1.2.840.99.2")
        assert (answer.status_code, reasons(answer)) == (409, {"FailedSOPSequence": [0xA900]})


@pytest.mark.parametrize(
    ("content", "kind", "headers", "status"),
    [
        (body(), DICOM, {}, 400),
        (b"", DICOM, {}, 400),
        (b"nonsense", DICOM, {}, 400),
        (body(study_film(1)), DICOM.replace("boundary=b", "boundary=c"), {}, 400),
        (body(study_film(1)), 'multipart/related; type="application/dicom"', {}, 400),
        (body(study_film(1)), DICOM.replace("boundary=b", f"boundary={'b' * 900}"), {}, 400),
        (b"--b\r\nX-A: " + bytes(1 << 20), DICOM, {}, 400),
        (body(study_film(1)), "application/dicom", {}, 415),
        (body(study_film(1)), "multipart/form-data; boundary=b", {}, 415),
        (body(study_film(1)), 'multipart/related; type="application/dicom+json"; boundary=b', {}, 415),
        (body(study_film(1)), "", {}, 415),
        (body(study_film(1)), DICOM, {"accept": "application/dicom+xml"}, 406),
    ],
)
def test_requests_that_cannot_be_read(tmp_path: Path, content: bytes, kind: str, headers: dict[str, str], status: int) -> None:
    with receiver(tmp_path) as (_, client):
        answer = post(client, content, kind, **headers)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert len(answer.json()["detail"]) > 10
    assert waiting(tmp_path) == []
    assert list((tmp_path / "spool" / "incoming").iterdir()) == []


@pytest.mark.parametrize("cut", [40, 700, 3000])
def test_a_body_that_ends_too_early_leaves_nothing_half_written(tmp_path: Path, cut: int) -> None:
    with receiver(tmp_path) as (_, client):
        answer = post(client, body(study_film(1), study_film(2))[:-cut])
        assert answer.status_code == 400
        assert answer.json()["detail"].count("1 instances before that were taken") == 1
        assert waiting(tmp_path) == [key_of("1.2.840.99.1.1.1")]
        assert not list((tmp_path / "spool" / "incoming").glob(f"{key_of('1.2.840.99.2.1.1')}*"))
        # The same request once more.
        assert post(client, body(study_film(1), study_film(2))).status_code == 200
    assert len(waiting(tmp_path)) == 2


def test_a_client_that_goes_away_or_falls_silent(tmp_path: Path) -> None:
    content = body(study_film(1), study_film(2))
    head = f"POST /studies HTTP/1.1\r\nHost: x\r\nContent-Type: {DICOM}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    limits = {"min_free_bytes": 0, "network_timeout_s": 1.0}
    with receiver(tmp_path, limits=limits) as (gateway, client):
        with socket.create_connection(("127.0.0.1", gateway.web_port)) as gone:
            gone.sendall(head + content[:-1000])
        with socket.create_connection(("127.0.0.1", gateway.web_port)) as silent:
            silent.settimeout(20)
            silent.sendall(head + content[:500])
            assert silent.recv(1000).startswith(b"HTTP/1.1 400 ")
        assert set(waiting(tmp_path)) <= {key_of("1.2.840.99.1.1.1")}
        assert post(client, content).status_code == 200
    assert len(waiting(tmp_path)) == 2


def test_what_is_too_large(tmp_path: Path) -> None:
    limits = {"max_instance_bytes": 1 << 20, "min_free_bytes": 0}
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield body(study_film(1), study_film(2, PixelData=bytes(4096)), end=b"")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            sent += 1 << 16
            yield bytes(1 << 16)

    with receiver(tmp_path, limits=limits, web={"max_instances": 3}) as (_, client):
        # More than one instance may have, and without an end: the answer or the end of the connection comes soon.
        started = time.monotonic()
        with suppress(httpx.TransportError):
            assert post(client, endless()).status_code == 413
        assert time.monotonic() - started < 30
        assert waiting(tmp_path) == [key_of("1.2.840.99.1.1.1")]
        large = post(client, body(study_film(3, PixelData=bytes(2 << 20), Rows=1024, Columns=2048)))
        assert large.status_code == 413
        assert large.headers["content-type"] == "application/problem+json"
        assert post(client, body(*(study_film(number) for number in range(4, 9)))).status_code == 413
    assert len(waiting(tmp_path)) == 4


def test_a_long_request_takes_no_more_memory_than_one_instance(tmp_path: Path) -> None:
    part = b"\r\n--b\r\n\r\n" + bytes(1 << 20)
    with receiver(tmp_path, limits={"max_instance_bytes": 4 << 20, "min_free_bytes": 0}) as (_, client):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = post(client, (part if number < 200 else b"\r\n--b--" for number in range(201)))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert reasons(answer) == {"OtherFailuresSequence": [0xC000] * 200}
    assert grown < 50 << 20


def test_a_full_spool_asks_to_come_back(tmp_path: Path) -> None:
    with receiver(tmp_path, limits={"max_instances": 1, "min_free_bytes": 0}) as (_, client):
        assert post(client, body(study_film(1), study_film(2))).status_code == 202
        answer = post(client, body(study_film(2)))
        assert (answer.status_code, reasons(answer)) == (503, {"FailedSOPSequence": [0xA700]})
        assert int(answer.headers["retry-after"]) > 0
    assert waiting(tmp_path) == [key_of("1.2.840.99.1.1.1")]


def test_only_those_with_the_scope_may_store_and_all_is_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, log = tmp_path / "keys.json", tmp_path / "audit.jsonl"
    pacs, reader = add_key(keys, "pacs", ["studies:write"]), add_key(keys, "reader", ["models:read"])
    expired = add_key(keys, "former", ["studies:write"], datetime.now(UTC) - timedelta(seconds=1))
    rules = [{"client": ["key:other"], "action": "refuse"}, {"calling_ae": ["SENDER"], "action": "refuse"}, {"action": "report"}]
    changes = {"web": {"access": {"keys_file": str(keys)}}, "audit_file": str(log), "rules": rules}
    with caplog.at_level("DEBUG"), receiver(tmp_path, **changes) as (_, client):
        for wrong in ("", "Bearer ssacl_guess", f"Bearer {expired}"):
            refused = post(client, body(study_film(1)), authorization=wrong)
            assert (refused.status_code, refused.headers["content-type"]) == (401, "application/problem+json")
        # A body that is larger than the sockets' buffers: the client still hears why.
        large = post(client, body(bytes(20 << 20)), authorization="Bearer ssacl_guess")
        assert large.status_code == 401
        assert post(client, body(study_film(1)), authorization=f"Bearer {reader}").status_code == 403
        assert client.get("/studies", headers={"authorization": f"Bearer {pacs}"}).status_code == 405
        assert client.get("/nothing").status_code == 401
        assert waiting(tmp_path) == []
        assert post(client, body(study_film(1), b"text"), authorization=f"Bearer {pacs}").status_code == 202
        assert waiting(tmp_path) == [key_of("1.2.840.99.1.1.1")]
    told = [(event.subtype[0].code, event.agent[0].who.identifier.value, event.outcomeDesc) for event in audited(log)]
    assert told == [
        *[("studies.store", "unknown", "401")] * 4,
        ("studies.store", "key:reader", "403"),
        ("unknown", "key:pacs", "405"),
        ("unknown", "unknown", "401"),
        ("instance.store", "key:pacs", "accepted 0000"),
        ("instance.store", "key:pacs", "failed C000"),
        ("studies.store", "key:pacs", "202"),
    ]
    written = caplog.text + log.read_text() + json.dumps([path.name for path in tmp_path.rglob("*")])
    assert [hidden for hidden in ("PLANTED", "1.2.840.99", pacs, reader, expired) if hidden in written] == []


def test_no_record_no_success(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with receiver(tmp_path, audit_file=str(full)) as (_, client):
        assert post(client, body(study_film(1))).status_code == 503


def test_tls(tmp_path: Path) -> None:
    cert, key = made_certificate(tmp_path)
    tls = {"certificate": str(cert), "private_key": str(key), "client_ca": str(cert)}
    log = tmp_path / "audit.jsonl"
    with receiver(tmp_path, web={"tls": tls}, audit_file=str(log)) as (gateway, plain):
        url = f"https://127.0.0.1:{gateway.web_port}/studies"
        with pytest.raises(httpx.TransportError):
            post(plain, body(study_film(1)))
        known = ssl.create_default_context(cafile=str(cert))
        with pytest.raises((httpx.TransportError, ssl.SSLError)):
            httpx.post(url, content=body(study_film(1)), headers={"content-type": DICOM}, verify=known, trust_env=False)
        known.load_cert_chain(cert, key)
        assert (
            httpx.post(url, content=body(study_film(1)), headers={"content-type": DICOM}, verify=known, trust_env=False).status_code == 200
        )
    assert len(waiting(tmp_path)) == 1


def test_a_connection_without_a_request_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gateway.web._OPENING_S", 0.3)
    with receiver(tmp_path) as (gateway, client):
        with socket.create_connection(("127.0.0.1", gateway.web_port)) as silent:
            silent.sendall(b"POST /studies HTTP/1.1\r\nX-A: ")
            silent.settimeout(20)
            assert silent.recv(100) == b""
        assert post(client, body(study_film(1))).status_code == 200


def test_what_cannot_be_listened_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no access is set up"), receiver(tmp_path, web={"host": "0.0.0.0"}):
        pass
    with (
        pytest.raises(ConfigError, match="TLS certificate"),
        receiver(tmp_path, web={"tls": {"certificate": "none", "private_key": "none"}}),
    ):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match="Choose another web"), receiver(tmp_path, web={"port": port}):
            pass
        with pytest.raises(ServeError, match="figures"), receiver(tmp_path, metrics={"port": port}):
            pass
    # Nothing of those that failed holds the spool.
    with receiver(tmp_path) as (_, client):
        assert post(client, body(study_film(1))).status_code == 200


def test_the_gateway_needs_neither_torch_nor_ray() -> None:
    code = "import sys, serve.gateway.service; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
