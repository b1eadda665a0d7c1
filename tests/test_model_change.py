"""Models change under load, on a real Ray Serve that runs `cluster/serve.yaml`: by the channel, back by one command, by `user_config`."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from dicom_nodes import until
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from tiny_model import encoded_film, other_weights, tiny_model_folder

from benchmarks.gateway_chaos import TARGETS, processes
from benchmarks.raylets import free_ports
from ray_jobs.session import ray_session
from serve.app import APPLICATION
from ssacl.cli import main
from ssacl.data.storage import open_storage
from ssacl.registry.versions import register
from ssacl.training.checkpoint import load_model_folder

CONFIG = Path(__file__).parents[1] / "cluster" / "serve.yaml"
NUM_CLIENTS = 3


@dataclass
class Models:
    registry: str
    names: list[str]
    """In the registry."""
    versions: list[str]
    """As a draft tells them."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    place = tmp_path_factory.mktemp("models")
    first = tiny_model_folder(place / "first")
    folders = [first, other_weights(first, place / "second")]
    storage = open_storage(place / "registry")
    names = [register(storage, open_storage(folder), folder).version for folder in folders]
    return Models(storage.url, names, [load_model_folder(folder).model_version for folder in folders])


def told(*arguments: str) -> None:
    assert main(["model", *arguments]) == 0


def config_of_the_endpoint(models: Models, port: int) -> dict[str, Any]:
    """The shipped file, for this machine."""
    tree: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    tree["proxy_location"], tree["http_options"] = "HeadOnly", {"host": "127.0.0.1", "port": port}
    arguments = tree["applications"][0]["args"]
    arguments["checkpoint_url"] = arguments["checkpoint_url"].replace("s3://BUCKET/models", models.registry)
    arguments |= {"cpus_per_replica": 0.4, "gpus_per_replica": 0, "max_replicas": 2, "num_ingress_replicas": 1}
    arguments |= {"num_threads": 1, "follow_s": 1.0}
    arguments |= {"service": {"access": {"insecure": True}}, "generation": {"num_beams": 1, "max_new_tokens": 8}}
    return tree


def deploy(tree: dict[str, Any]) -> None:
    """What `serve deploy` does."""
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(tree))


def is_running() -> bool:
    application = serve.status().applications.get(APPLICATION)
    return application is not None and application.status == "RUNNING"


@pytest.fixture
def endpoint(models: Models) -> Iterator[tuple[str, dict[str, Any]]]:
    told("promote", models.registry, models.names[0], "--channel", "stable")
    (port,) = free_ports(1)
    tree = config_of_the_endpoint(models, port)
    with ray_session():
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=port))
        try:
            deploy(tree)
            until(is_running, 200)
            yield f"http://127.0.0.1:{port}", tree
        finally:
            serve.shutdown()


@dataclass
class Load:
    """What steady clients were answered."""

    statuses: list[int] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)

    async def until_all_say(self, version: str) -> None:
        """Until all of the last answers are this version's."""
        async with asyncio.timeout(60):
            while self.versions[-30:] != [version] * 30:
                await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def steady_load(url: str) -> AsyncIterator[Load]:
    load = Load()

    async def client(number: int) -> None:
        film = encoded_film("PNG", seed=number)
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while True:
                answer = await http.post("/v1/reports?maps=false", files={"file": film})
                load.statuses.append(answer.status_code)
                if answer.status_code == 200:
                    load.versions.append(answer.json()["model_version"])

    async with asyncio.TaskGroup() as group:
        clients = [group.create_task(client(number)) for number in range(NUM_CLIENTS)]
        yield load
        for each in clients:
            each.cancel()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_request_fails_while_models_change_and_change_back(endpoint: tuple[str, dict[str, Any]], models: Models) -> None:
    url, tree = endpoint
    old, new = models.versions
    replicas = {process.pid for process in processes(TARGETS["model replica"])}
    assert len(replicas) == 2

    async def work() -> Load:
        async with steady_load(url) as load:
            await load.until_all_say(old)
            await asyncio.to_thread(told, "promote", models.registry, models.names[1], "--channel", "stable")
            await load.until_all_say(new)
            await asyncio.to_thread(told, "rollback", models.registry, "--channel", "stable")
            await load.until_all_say(old)
            # Pinned, whatever the channel says: the same file with the models as `user_config`.
            pinned = copy.deepcopy(tree)
            arguments = pinned["applications"][0]["args"]
            user_config = {"checkpoint_url": f"{models.registry}@{models.names[1]}", "generation": arguments["generation"]}
            pinned["applications"][0]["deployments"] = [{"name": "model", "user_config": user_config}]
            await asyncio.to_thread(deploy, pinned)
            await load.until_all_say(new)
        return load

    load = asyncio.run(work())
    assert set(load.statuses) == {200}
    assert set(load.versions) == {old, new}
    # None of them was started anew: the next model was loaded beside the one that served.
    assert {process.pid for process in processes(TARGETS["model replica"])} == replicas
