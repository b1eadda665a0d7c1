"""A short form of benchmarks/gateway_chaos.py: Ray Serve, gateway and archive for real, and each kind of process killed once."""

from __future__ import annotations

from pathlib import Path

import pytest
from dicom_nodes import free_port, study_film, until
from report_endpoint import InProcess, running_endpoint
from tiny_model import tiny_model_folder

from benchmarks.gateway_chaos import chaos
from benchmarks.http_client import HttpClient


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_accepted_film_has_exactly_one_result_whatever_is_killed(tmp_path: Path) -> None:
    figures = chaos(tmp_path, num_films=6, num_kills=4)
    assert figures["killed"] == {"controller": 1, "gateway": 1, "ingress replica": 1, "model replica": 1}
    assert (figures["accepted_share"], figures["lost"], figures["doubled"], figures["quarantined"]) == (1.0, 0, 0, 0)
    assert figures["reported"] == 6
    assert figures["http"]["failed"] == 0
    assert figures["http"]["requests"] > 0
    assert figures["of_films_never_sent"] == 0


def test_the_client_repeats_while_the_endpoint_is_away(tmp_path: Path) -> None:
    model, port = InProcess(tiny_model_folder(tmp_path / "model")), free_port()
    with HttpClient(f"http://127.0.0.1:{port}/v1/reports", study_film(1)) as client:
        until(lambda: client.first_answers)
        with running_endpoint(model, port):
            until(lambda: len(client.attempts) > 1)
            client.stop()
    figures = client.figures()
    assert (figures["failed"], figures["first_answers"]["broke off"]) == (0, 1)
    assert figures["most_attempts"] > 1
