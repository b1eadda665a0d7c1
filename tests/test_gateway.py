"""The gateway between real DICOM nodes and the real HTTP interface over a tiny model."""

from __future__ import annotations

import io
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicom_files import film
from dicom_nodes import CALLER, Archive, free_port, gateway_config, made_certificate, running_archive, send, study_film, until
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless
from pynetdicom import AE
from report_endpoint import InProcess, running_endpoint
from tiny_model import tiny_model_folder

from serve.gateway.config import GatewayConfig
from serve.gateway.routing import Caller, decide
from serve.gateway.service import Gateway
from serve.gateway.spool import read_status
from ssacl.data.dicom import Picture
from ssacl.inference.report import DraftReport

ALL = ["OT", "SEG", "SR"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    return InProcess(tiny_model_folder(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def endpoint_port(model: InProcess) -> Iterator[int]:
    port = free_port()
    with running_endpoint(model, port):
        yield port


@pytest.fixture
def archive() -> Iterator[tuple[Archive, int]]:
    port = free_port()
    with running_archive(Archive(), port) as node:
        yield node, port


def test_films_of_every_kind_come_back_as_results_in_their_study(
    tmp_path: Path, endpoint_port: int, archive: tuple[Archive, int], caplog: pytest.LogCaptureFixture
) -> None:
    node, port = archive
    deep = (film(64).astype(np.uint16) << 4) | 7
    films = [
        study_film(1),
        study_film(2, syntax=RLELossless),
        study_film(3, syntax=JPEGLSLossless),
        study_film(4, syntax=JPEG2000Lossless),
        study_film(5, PhotometricInterpretation="MONOCHROME1", SOPClassUID="1.2.840.10008.5.1.4.1.1.1", Modality="CR"),
        study_film(6, SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1.1", PixelData=deep.tobytes(), BitsAllocated=16, BitsStored=12, HighBit=11),
    ]
    with caplog.at_level("DEBUG"), Gateway(gateway_config(tmp_path, endpoint_port, port)) as gateway:
        assert send(gateway.port, *films) == [0] * len(films)
        until(lambda: read_status(tmp_path)["done"] == {"reported": len(films)})
    assert node.studies() == {f"1.2.840.99.{number}": ALL for number in range(1, 7)}
    report = next(ds for ds in node.received if ds.Modality == "SR")
    assert (report.PatientID, report.VerificationFlag, report.CompletionFlag) == ("PLANTED-ID", "UNVERIFIED", "PARTIAL")
    names = " ".join(str(path) for path in tmp_path.rglob("*"))
    for hidden in ("PLANTED", "1.2.840.99"):
        assert hidden not in caplog.text
        assert hidden not in names
        assert not any(hidden.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_duplicate_is_processed_once(tmp_path: Path, model: InProcess, endpoint_port: int, archive: tuple[Archive, int]) -> None:
    node, port = archive
    before = model.num_reports
    with Gateway(gateway_config(tmp_path, endpoint_port, port)) as gateway:
        assert send(gateway.port, study_film(1), study_film(1)) == [0, 0]
        until(lambda: read_status(tmp_path)["done"])
        assert send(gateway.port, study_film(1)) == [0]
    assert model.num_reports == before + 1
    assert node.studies() == {"1.2.840.99.1": ALL}


def test_films_wait_while_the_endpoint_is_away(tmp_path: Path, model: InProcess, archive: tuple[Archive, int]) -> None:
    node, port = archive
    endpoint_port = free_port()
    with Gateway(gateway_config(tmp_path, endpoint_port, port)) as gateway:
        assert send(gateway.port, study_film(1), study_film(2)) == [0, 0]
        until(lambda: read_status(tmp_path)["put_off"] == {"endpoint_away": 2})
        assert not node.received
        with running_endpoint(model, endpoint_port):
            until(lambda: read_status(tmp_path)["done"] == {"reported": 2})
    assert node.studies() == {f"1.2.840.99.{number}": ALL for number in (1, 2)}


def test_results_wait_while_the_archive_is_away_and_are_made_once(tmp_path: Path, model: InProcess, endpoint_port: int) -> None:
    port, before = free_port(), model.num_reports
    config = gateway_config(tmp_path, endpoint_port, port)
    with Gateway(config) as gateway:
        assert send(gateway.port, study_film(1)) == [0]
        until(lambda: read_status(tmp_path)["put_off"] == {"destination_archive_away": 1})
    kept = sorted(path.read_bytes() for path in tmp_path.glob("waiting/*/results/*.dcm"))
    # The archive is there and has no room; then it has.
    node = Archive(answer=0xA700)
    with running_archive(node, port), Gateway(config):
        until(lambda: read_status(tmp_path)["put_off"] == {"destination_archive_out_of_resources": 1})
        node.answer = 0
        until(lambda: read_status(tmp_path)["done"] == {"reported": 1})
    assert model.num_reports == before + 1
    assert len(kept) == len(node.received) == 3
    assert {pydicom.dcmread(io.BytesIO(content)).SOPInstanceUID for content in kept} == {ds.SOPInstanceUID for ds in node.received}


def test_a_destination_that_is_away_holds_up_no_other(tmp_path: Path, endpoint_port: int, archive: tuple[Archive, int]) -> None:
    node, port = archive
    away = free_port()
    kind = {"kind": "c-store", "host": "127.0.0.1", "ae_title": "ARCHIVE"}
    config = gateway_config(tmp_path, endpoint_port, 1, destinations={"away": kind | {"port": away}, "here": kind | {"port": port}})
    with Gateway(config) as gateway:
        assert send(gateway.port, study_film(1)) == [0]
        until(lambda: node.studies() == {"1.2.840.99.1": ALL} and read_status(tmp_path)["put_off"] == {"destination_away_away": 1})
        with running_archive(Archive(), away) as late:
            until(lambda: read_status(tmp_path)["done"] == {"reported": 1})
    assert late.studies() == node.studies() == {"1.2.840.99.1": ALL}


class Broken(InProcess):
    """An endpoint that fails at every film."""

    def __init__(self) -> None:
        self.num_reports = 0

    async def report(self, picture: Picture, model: str | None = None) -> DraftReport:
        self.num_reports += 1
        raise RuntimeError("PLANTED")


def test_what_can_never_be_done_is_quarantined_with_its_reason(
    tmp_path: Path, endpoint_port: int, archive: tuple[Archive, int], caplog: pytest.LogCaptureFixture
) -> None:
    node, port = archive
    blank = study_film(1, PixelData=bytes(64 * 64))
    with Gateway(gateway_config(tmp_path, endpoint_port, port)) as gateway:
        assert send(gateway.port, blank, study_film(2)) == [0, 0]
        until(lambda: read_status(tmp_path)["done"] == {"reported": 1})
        until(lambda: read_status(tmp_path)["quarantine"] == {"endpoint_blank": 1})
        # Mended at its source and sent again, it is taken up again.
        assert send(gateway.port, study_film(1)) == [0]
        until(lambda: read_status(tmp_path)["done"] == {"reported": 2})
    assert read_status(tmp_path)["quarantine"] == {}
    assert set(node.studies()) == {"1.2.840.99.1", "1.2.840.99.2"}
    assert "PLANTED" not in caplog.text


def test_a_film_that_the_endpoint_fails_at_is_given_up_after_some_attempts(tmp_path: Path, archive: tuple[Archive, int]) -> None:
    endpoint_port, broken = free_port(), Broken()
    with running_endpoint(broken, endpoint_port), Gateway(gateway_config(tmp_path, endpoint_port, archive[1])) as gateway:
        assert send(gateway.port, study_film(1)) == [0]
        until(lambda: read_status(tmp_path)["quarantine"] == {"endpoint_500": 1})
    assert broken.num_reports == 3


def test_an_archive_that_takes_no_results_is_named(tmp_path: Path, endpoint_port: int) -> None:
    port = free_port()
    with running_archive(Archive(answer=0xC000), port), Gateway(gateway_config(tmp_path, endpoint_port, port)) as gateway:
        assert send(gateway.port, study_film(1)) == [0]
        until(lambda: read_status(tmp_path)["quarantine"] == {"destination_archive_status_C000": 1})


@pytest.mark.parametrize("limits", [{"max_instances": 1, "min_free_bytes": 0}, {"min_free_bytes": 1 << 60}])
def test_a_full_spool_refuses_and_keeps_what_it_has(tmp_path: Path, limits: dict[str, int]) -> None:
    with Gateway(gateway_config(tmp_path, free_port(), free_port(), limits=limits)) as gateway:
        statuses = send(gateway.port, study_film(1), study_film(2))
        assert statuses == [0 if "max_instances" in limits else 0xA700, 0xA700]
        assert read_status(tmp_path)["waiting"] == statuses.count(0)


def test_an_instance_without_end_ends_its_association(tmp_path: Path) -> None:
    limits = {"max_instance_bytes": 1 << 20, "min_free_bytes": 0}
    with Gateway(gateway_config(tmp_path, free_port(), free_port(), limits=limits)) as gateway:
        large = study_film(1, PixelData=bytes(4 << 20), Rows=2048, Columns=2048)
        assert send(gateway.port, large) in ([None], [])
        medium = study_film(1, PixelData=bytes(3 << 19), Rows=1024, Columns=1536)
        assert send(gateway.port, medium) == [0xA700]
        assert send(gateway.port, study_film(2)) == [0]
        assert read_status(tmp_path)["waiting"] == 1


def test_only_known_callers_are_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Gateway(gateway_config(tmp_path, free_port(), free_port())) as gateway:
        assert send(gateway.port, study_film(1), caller="STRANGER") == []
        assert send(gateway.port, study_film(1), called="ANOTHER") == []
        assert "an association was rejected" in caplog.text
        ae = AE(CALLER)
        ae.add_requested_context("1.2.840.10008.1.1")
        association = ae.associate("127.0.0.1", gateway.port, ae_title="SSACL")
        assert association.send_c_echo().Status == 0
        association.release()
    assert read_status(tmp_path)["waiting"] == 0


RULES = [
    {"calling_ae": ["OUTSIDE"], "action": "refuse", "reason": "not from there"},
    {"subject": ["frontal"], "modality": ["CR"], "action": "report", "destinations": []},
    {"subject": ["frontal"], "view": ["PA", "AP", ""], "action": "report"},
    {"subject": ["lateral"], "action": "pass", "reason": "lateral film"},
]


@pytest.mark.parametrize(
    ("caller", "attributes", "action", "reason", "destinations"),
    [
        (CALLER, {}, "report", "frontal", ("archive",)),
        (CALLER, {"Modality": "CR"}, "report", "frontal", ()),
        (CALLER, {"ViewPosition": "LL"}, "pass", "lateral film", ("archive",)),
        (CALLER, {"ViewPosition": "", "SeriesDescription": "THORAX LATERAL"}, "pass", "lateral film", ("archive",)),
        (CALLER, {"BodyPartExamined": "KNEE"}, "refuse", "not_chest", ()),
        (CALLER, {"Modality": "CT"}, "refuse", "not_radiography", ()),
        (CALLER, {"NumberOfFrames": 4}, "refuse", "multi_frame", ()),
        (CALLER, {"Manufacturer": "ssacl", "ManufacturerModelName": "ssacl"}, "pass", "own_result", ()),
        ("OUTSIDE", {}, "refuse", "not from there", ("archive",)),
    ],
)
def test_rules(tmp_path: Path, caller: str, attributes: dict[str, Any], action: str, reason: str, destinations: tuple[str, ...]) -> None:
    config = gateway_config(tmp_path, 1, 1, calling_ae=[CALLER, "OUTSIDE"], rules=RULES, otherwise="refuse")
    decision = decide(config, Caller(caller, "c-store"), pydicom.dcmread(io.BytesIO(study_film(1, **attributes))))
    assert (decision.action, decision.reason, decision.destinations) == (action, reason, destinations)


def test_a_refused_and_a_passed_film_are_answered_by_rule(tmp_path: Path) -> None:
    config = gateway_config(tmp_path, free_port(), free_port(), rules=RULES, otherwise="refuse")
    with Gateway(config) as gateway:
        assert send(gateway.port, study_film(1, ViewPosition="LL"), study_film(2, BodyPartExamined="KNEE")) == [0, 0x0124]
    status = read_status(tmp_path)
    assert (status["waiting"], status["done"]) == (0, {"passed lateral film": 1})


def test_tls_with_client_certificates(tmp_path: Path) -> None:
    cert, key = made_certificate(tmp_path)
    tls = {"certificate": str(cert), "private_key": str(key), "client_ca": str(cert)}
    with Gateway(gateway_config(tmp_path / "spool", free_port(), free_port(), tls=tls)) as gateway:
        known = ssl.create_default_context(cafile=str(cert))
        known.load_cert_chain(cert, key)
        nobody = ssl.create_default_context(cafile=str(cert))
        with socket.create_connection(("127.0.0.1", gateway.port)):
            # A caller that says nothing holds up no other.
            assert send(gateway.port, study_film(1), tls_args=(known, "127.0.0.1")) == [0]
        assert send(gateway.port, study_film(2)) == []
        assert send(gateway.port, study_film(3), tls_args=(nobody, "127.0.0.1")) == []
    assert read_status(tmp_path / "spool")["waiting"] == 1


def test_the_example_of_the_help_text_is_a_configuration() -> None:
    from serve.gateway.config import parse_gateway_config
    from ssacl.commands.gateway import EXAMPLE

    assert isinstance(parse_gateway_config(EXAMPLE), GatewayConfig)
