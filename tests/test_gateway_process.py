"""The `ssacl gateway` process under kill -9."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dicom_nodes import Archive, free_port, gateway_config, running_archive, send, study_film, until
from report_endpoint import InProcess, running_endpoint
from tiny_model import tiny_model_folder

from benchmarks.gateway_nodes import GatewayProcess
from serve.gateway.spool import read_status

ALL = ["OT", "SEG", "SR"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    return InProcess(tiny_model_folder(tmp_path_factory.mktemp("model") / "model"))


def gateway_process(folder: Path, endpoint_port: int, archive_port: int, port: int) -> GatewayProcess:
    """The command, until the end of the block or until it is killed."""
    return GatewayProcess(folder, gateway_config(folder / "spool", endpoint_port, archive_port, port=port))


def test_a_film_accepted_before_kill_9_is_reported_after_it(tmp_path: Path, model: InProcess) -> None:
    ports = endpoint_port, archive_port, _ = [free_port() for _ in range(3)]
    with running_archive(Archive(), archive_port) as archive:
        with gateway_process(tmp_path, *ports) as gateway:
            odd = study_film(3, StudyInstanceUID="1.02.PLANTED")
            assert send(ports[2], study_film(1), study_film(2), odd) == [0, 0, 0xC000]
            gateway.kill()
        assert read_status(tmp_path / "spool")["waiting"] == 2
        with running_endpoint(model, endpoint_port), gateway_process(tmp_path, *ports) as gateway:
            until(lambda: read_status(tmp_path / "spool")["done"] == {"reported": 2})
            command = [sys.executable, "-m", "ssacl.cli", "gateway", "--config", str(tmp_path / "gateway.yaml"), "--status"]
            told = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
            assert json.loads(told.stdout)["done"] == {"reported": 2}
            assert gateway.stop() == 0
    assert archive.studies() == {f"1.2.840.99.{number}": ALL for number in (1, 2)}
    log = (tmp_path / "log").read_text()
    for hidden in ("PLANTED", "1.2.840.99"):
        assert hidden not in log


def test_films_sent_while_it_is_killed_at_random_have_one_result_each(tmp_path: Path, model: InProcess) -> None:
    """Whatever was answered with Success has its results once; what was not is sent again, as an archive does."""
    chance = random.Random(5)
    ports = endpoint_port, archive_port, port = [free_port() for _ in range(3)]
    left = list(range(1, 9))
    with running_archive(Archive(), archive_port) as archive, running_endpoint(model, endpoint_port):
        for _ in range(2):
            with gateway_process(tmp_path, *ports) as gateway:
                for number in left[:4]:
                    if send(port, study_film(number)) == [0]:
                        left.remove(number)
                time.sleep(chance.uniform(0.0, 0.8))
                gateway.kill()
        assert len(left) < 8
        accepted = set(range(1, 9)) - set(left)
        with gateway_process(tmp_path, *ports):
            until(lambda: read_status(tmp_path / "spool")["done"].get("reported") == len(accepted))
    assert archive.studies().keys() == {f"1.2.840.99.{number}" for number in accepted}
    instances = archive.instances()
    # A result sent again after a crash is the same instance.
    assert all(len(uids) == 1 for uids in instances.values())
    assert len(instances) == 3 * len(accepted)
    assert read_status(tmp_path / "spool")["quarantine"] == {}
