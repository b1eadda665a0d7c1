"""The endpoint from its config file on a real Ray Serve: several models, and another one in their place while requests go on."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from test_serve import free_port
from tiny_model import encoded_film, other_weights, tiny_model_folder

from ray_jobs.session import ray_session
from ssacl.training.checkpoint import load_model_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CONFIG = Path(__file__).parents[1] / "cluster" / "serve_config.yaml"
FILM = encoded_film("PNG", seed=3)


@dataclass
class Endpoint:
    """A running application, its address and the config that it was deployed with."""

    url: str
    tree: dict[str, Any]
    versions: dict[str, str]
    folders: dict[str, Path]

    def deploy(self, **user_config: Any) -> None:
        """As `serve deploy` does with a changed file."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        self.tree = copy.deepcopy(self.tree)
        self.tree["applications"][0]["deployments"][0]["user_config"] |= user_config
        _get_global_client().deploy_apps(ServeDeploySchema(**self.tree), _blocking=True)

    def report(self, model: str = "", timeout_s: float = 60) -> httpx.Response:
        query = f"?maps=false&model={model}" if model else "?maps=false"
        return httpx.post(f"{self.url}/v1/reports{query}", files={"file": FILM}, timeout=timeout_s)

    def models(self) -> dict[str | None, str]:
        answer = httpx.get(f"{self.url}/v1/models", timeout=30)
        return {item["name"]: item["model_version"] for item in answer.json()["models"]}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    from ray import serve
    from ray.serve.config import HTTPOptions

    place = tmp_path_factory.mktemp("models")
    first = tiny_model_folder(place / "first")
    folders = {"first": first, "second": other_weights(first, place / "second")}
    versions = {name: load_model_folder(folder).model_version for name, folder in folders.items()}
    tree = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    application = tree["applications"][0]
    for settings in (application["args"], application["deployments"][0]["user_config"]):
        settings["checkpoint_url"] = str(folders["first"])
    application["deployments"][0]["user_config"]["generation"] = {"num_beams": 1, "max_new_tokens": 8}
    port = free_port()
    tree["http_options"]["port"] = port
    with ray_session(num_cpus=4):
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
        try:
            running = Endpoint(f"http://127.0.0.1:{port}", tree, versions, folders)
            running.deploy(more_models={"second": str(folders["second"])})
            yield running
        finally:
            serve.shutdown()


@dataclass
class Load:
    """Requests one after another in threads, until the block ends."""

    endpoint: Endpoint
    answers: list[httpx.Response] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def _send(self) -> None:
        while not self._over.is_set():
            try:
                self.answers.append(self.endpoint.report())
            except httpx.TransportError as error:
                self.failures.append(error)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._send, daemon=True) for _ in range(3)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)


def until(holds: Callable[[], bool], limit_s: float = 90) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.2)
    return False


def test_models_by_name(endpoint: Endpoint) -> None:
    assert endpoint.models() == {None: endpoint.versions["first"], "second": endpoint.versions["second"]}
    assert endpoint.report().json()["model_version"] == endpoint.versions["first"]
    assert endpoint.report("second").json()["model_version"] == endpoint.versions["second"]
    refused = endpoint.report("third")
    assert refused.status_code == 400
    assert refused.headers["content-type"] == "application/problem+json"


def test_another_model_takes_over_and_no_request_fails(endpoint: Endpoint) -> None:
    with Load(endpoint) as load:
        assert until(lambda: len(load.answers) >= 5)
        endpoint.deploy(checkpoint_url=str(endpoint.folders["second"]), more_models={})
        assert until(lambda: load.answers[-1].json()["model_version"] == endpoint.versions["second"])
        after = len(load.answers)
        assert until(lambda: len(load.answers) >= after + 5)
    assert not load.failures
    assert {answer.status_code for answer in load.answers} == {200}
    seen = [answer.json()["model_version"] for answer in load.answers]
    assert set(seen) == set(endpoint.versions.values())
    assert endpoint.models() == {None: endpoint.versions["second"]}


def test_a_model_that_is_not_there_leaves_the_one_that_serves(endpoint: Endpoint, tmp_path: Path) -> None:
    before = endpoint.models()
    endpoint.deploy(checkpoint_url=str(tmp_path / "nothing"))
    for _ in range(3):
        assert endpoint.report().status_code == 200
    assert endpoint.models() == before
