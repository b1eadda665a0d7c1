"""Joining Ray: what goes to its workers, and a start that fails."""

from __future__ import annotations

import socket
import time

import pytest
import ray

from ray_jobs.session import ray_session, storage_environment
from ssacl.errors import ClusterError


def test_workers_get_what_storage_needs_and_never_the_key_of_the_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("DICOMWEB_TOKEN", "t")
    monkeypatch.setenv("SSACL_KEY_SECRET", "a secret of the tests")
    sent = storage_environment()
    assert {"AWS_ENDPOINT_URL", "DICOMWEB_TOKEN"} <= sent.keys()
    assert "SSACL_KEY_SECRET" not in sent
    assert "PATH" not in sent


@pytest.mark.parametrize("error", [Exception("The node is not up after 60 s.\nstack"), RuntimeError(), ConnectionError("no")])
def test_a_ray_that_does_not_come_up_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterError, match="Cannot reach or start a local Ray"), ray_session(1):
        pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_where_nobody_listens_is_told_at_once(scheme: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{closed.getsockname()[1]}"
        started = time.monotonic()
        with (
            pytest.raises(ClusterError, match=f"cluster at {address}: .*Connection refused. Check --address"),
            ray_session(address=address),
        ):
            pass
    assert time.monotonic() - started < 5
