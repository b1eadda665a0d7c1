"""What the gateway tells of itself: figures for Prometheus, and a record of whoever was let in or turned away."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

import httpx
import pytest
from api_calls import audited
from dicom_nodes import Archive, free_port, gateway_config, made_certificate, running_archive, send, study_film, until
from prometheus_client.parser import text_string_to_metric_families
from report_endpoint import InProcess, running_endpoint
from tiny_model import tiny_model_folder

from serve.gateway.service import Gateway
from serve.gateway.spool import key_of, read_status


def figures(gateway: Gateway) -> dict[str, float]:
    """Name and label values, in the order of the labels' names -> value."""
    text = httpx.get(f"http://127.0.0.1:{gateway.metrics_port}/metrics", timeout=20).text
    assert [hidden for hidden in ("PLANTED", "1.2.840.99", "SENDER", key_of("1.2.840.99.1.1.1")[:12]) if hidden in text] == []
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        " ".join((sample.name.removeprefix("ssacl_gateway_"), *(value for _, value in sorted(sample.labels.items())))): sample.value
        for sample in samples
    }


def test_figures_follow_a_film_through_the_gateway(tmp_path: Path) -> None:
    endpoint_port, archive_port = free_port(), free_port()
    rules = [{"subject": ["not_chest"], "action": "refuse"}, {"subject": ["frontal"], "action": "report"}]
    config = gateway_config(
        tmp_path, endpoint_port, archive_port, rules=rules, metrics={"port": 0}, limits={"max_instances": 2, "min_free_bytes": 0}
    )
    with Gateway(config) as gateway:
        at_rest = figures(gateway)
        assert (at_rest["oldest_waiting_seconds"], at_rest["spool_instances unread"], at_rest["settled_total quarantined"]) == (0, 0, 0)
        blank = study_film(2, PixelData=bytes(64 * 64))
        films = [
            study_film(1),
            study_film(1),
            blank,
            study_film(3),
            study_film(4, ViewPosition="LL"),
            study_film(5, BodyPartExamined="KNEE"),
        ]
        assert send(gateway.port, *films) == [0, 0, 0, 0xA700, 0, 0x0124]
        assert send(gateway.port, study_film(1), caller="STRANGER") == []
        until(lambda: figures(gateway).get("attempts_total away endpoint"))
        time.sleep(0.2)
        seen = figures(gateway)
        received = {name.split()[1]: value for name, value in seen.items() if name.startswith("received_total ")}
        assert received == {"accepted": 2, "known": 1, "full": 1, "passed": 1, "refused": 1}
        assert seen["turned_away_total association"] == 1
        assert (seen["spool_instances unread"], seen["spool_instances undelivered"]) == (2, 0)
        assert seen["spool_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("waiting/*/film.dcm")) > 8192
        assert 0.2 <= seen["oldest_waiting_seconds"] < 60
        with running_endpoint(InProcess(tiny_model_folder(tmp_path / "model")), endpoint_port):
            until(lambda: figures(gateway)["spool_instances undelivered"] == 1)
            with running_archive(Archive(), archive_port):
                until(lambda: figures(gateway)["settled_total delivered"] == 1)
        done = figures(gateway)
    assert (done["settled_total quarantined"], done["spool_instances quarantine"]) == (1, 1)
    assert (done["attempts_total done endpoint"], done["attempts_total refused endpoint"], done["attempts_total done archive"]) == (1, 1, 1)
    assert done["attempts_total away archive"] >= 1
    assert (done["spool_instances undelivered"], done["spool_bytes"], done["oldest_waiting_seconds"]) == (0, 0, 0)


def test_what_waited_before_a_restart_is_counted_after_it(tmp_path: Path) -> None:
    config = gateway_config(tmp_path, free_port(), free_port(), metrics={"port": 0})
    with Gateway(config) as gateway:
        assert send(gateway.port, study_film(1)) == [0]
    time.sleep(0.5)
    with Gateway(config) as gateway:
        seen = figures(gateway)
    assert seen["spool_instances unread"] == 1
    assert seen["oldest_waiting_seconds"] >= 0.5


def test_whoever_is_turned_away_is_on_record(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    with Gateway(gateway_config(tmp_path / "spool", free_port(), free_port(), audit_file=str(log))) as gateway:
        assert send(gateway.port, study_film(1), caller="STRANGER") == []
        assert send(gateway.port, study_film(1), called="ANOTHER") == []
        assert send(gateway.port, study_film(1), study_film(2, BodyPartExamined="KNEE")) == [0, 0]
        until(lambda: len(log.read_text().splitlines()) == 4)
    events = audited(log)
    told = [(event.subtype[0].code, event.agent[0].who.identifier.value, event.outcome, event.outcomeDesc) for event in events]
    assert told == [
        ("association", "STRANGER", "4", "association rejected"),
        ("association", "SENDER", "4", "association rejected"),
        ("instance.store", "SENDER", "0", "accepted 0000"),
        ("instance.store", "SENDER", "0", "passed 0000"),
    ]
    assert {event.agent[0].network.address for event in events} == {"127.0.0.1"}
    assert [event.type.code for event in events] == ["110113", "110113", "110104", "110104"]
    assert events[2].entity[1].what.identifier.value == key_of("1.2.840.99.1.1.1")
    assert [hidden for hidden in ("PLANTED", "1.2.840.99") if hidden in log.read_text()] == []


def test_plain_text_where_tls_is_demanded_is_refused_and_on_record(tmp_path: Path) -> None:
    cert, key = made_certificate(tmp_path)
    log, tls = tmp_path / "audit.jsonl", {"certificate": str(cert), "private_key": str(key), "client_ca": str(cert)}
    with Gateway(gateway_config(tmp_path / "spool", free_port(), free_port(), tls=tls, audit_file=str(log))) as gateway:
        assert send(gateway.port, study_film(1)) == []
        nobody = ssl.create_default_context(cafile=str(cert))
        assert send(gateway.port, study_film(1), tls_args=(nobody, "127.0.0.1")) == []
        until(lambda: len(log.read_text().splitlines()) == 2)
    told = [(event.subtype[0].code, event.agent[0].who.identifier.value, event.outcome, event.outcomeDesc) for event in audited(log)]
    assert told == [("association", "unknown", "4", "no TLS, or no certificate that is accepted")] * 2
    assert read_status(tmp_path / "spool")["waiting"] == 0


def test_no_record_no_success(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with Gateway(gateway_config(tmp_path, free_port(), free_port(), audit_file=str(full))) as gateway:
        assert send(gateway.port, study_film(1)) == [0xA700]
        # Turned away all the same.
        assert send(gateway.port, study_film(1), caller="STRANGER") == []


def test_a_connection_that_asks_for_no_figures_holds_up_nobody(tmp_path: Path) -> None:
    with (
        Gateway(gateway_config(tmp_path, free_port(), free_port(), metrics={"port": 0})) as gateway,
        socket.create_connection(("127.0.0.1", gateway.metrics_port)),
    ):
        assert figures(gateway)["spool_instances unread"] == 0
