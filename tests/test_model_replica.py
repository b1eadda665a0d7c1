"""A model replica without Ray around it: several models, another one in their place while it reads, and what it says of itself."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import encoded_film, other_weights, tiny_model_folder

from serve.app import build_app
from serve.replica import ModelReplica
from serve.settings import ServeSettings
from ssacl.data.dicom import read_picture
from ssacl.data.storage import open_storage
from ssacl.errors import ConfigError, ServeError
from ssacl.inference.report import DraftReport
from ssacl.registry.channels import promote, rollback
from ssacl.registry.versions import register
from ssacl.training.checkpoint import load_model_folder

PICTURE = read_picture(encoded_film("PNG", seed=3), "film")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("models")
    first = tiny_model_folder(place / "first")
    return [first, other_weights(first, place / "second")]


@pytest.fixture(scope="module")
def versions(folders: list[Path]) -> list[str]:
    return [load_model_folder(folder).model_version for folder in folders]


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"checkpoint_url": str(folder), "generation": {"num_beams": 1, "max_new_tokens": 8}, "max_batch_size": 3, **changes}


def with_replica(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 250))


async def until_served(replica: ModelReplica, version: str) -> None:
    end = time.monotonic() + 60
    while (await replica.describe())["model_version"] != version:
        assert time.monotonic() < end, "the model did not change"
        await asyncio.sleep(0.02)


def test_models_by_name_in_one_batch(folders: list[Path], versions: list[str]) -> None:
    async def work() -> None:
        replica = ModelReplica(1, "cpu", 60.0)
        await replica.reconfigure(config(folders[0], more_models={"next": str(folders[1])}, batch_wait_s=0.5))
        drafts = await asyncio.gather(*(replica.report(PICTURE, name) for name in (None, "next", None)))
        assert [draft.model_version for draft in drafts] == [versions[0], versions[1], versions[0]]
        assert drafts[0].to_json() == drafts[2].to_json()
        assert {item["name"]: item["model_version"] for item in await replica.describe_all()} == {None: versions[0], "next": versions[1]}
        with pytest.raises(ConfigError, match="next"):
            await replica.report(PICTURE, "another")

    with_replica(work())


def test_another_model_takes_over_while_requests_go_on(folders: list[Path], versions: list[str]) -> None:
    async def work() -> None:
        replica = ModelReplica(1, "cpu", 60.0)
        await replica.reconfigure(config(folders[0]))
        seen: list[str] = []

        async def client() -> None:
            while versions[1] not in seen[-3:]:
                draft: DraftReport = await replica.report(PICTURE)
                seen.append(draft.model_version)

        clients = [asyncio.create_task(client()) for _ in range(3)]
        await replica.report(PICTURE)
        await replica.reconfigure(config(folders[1]))
        # The change is asked for and not waited for: the model before still answers.
        assert (await replica.describe())["model_version"] == versions[0]
        await asyncio.gather(*clients)
        assert set(seen) == set(versions)
        assert (await replica.describe())["model_version"] == versions[1]

    with_replica(work())


def test_what_cannot_be_loaded_changes_nothing_until_it_can(folders: list[Path], versions: list[str], tmp_path: Path) -> None:
    async def work() -> None:
        replica = ModelReplica(1, "cpu", 60.0)
        await replica.reconfigure(config(folders[0]))
        await replica.reconfigure(config(tmp_path / "later", follow_s=0.1))
        await asyncio.sleep(0.5)
        assert (await replica.report(PICTURE)).model_version == versions[0]
        with pytest.raises(ConfigError, match="max_batchsize"):
            await replica.reconfigure(config(folders[1], max_batchsize=2))
        assert (await replica.describe())["model_version"] == versions[0]
        shutil.copytree(folders[1], tmp_path / "later")
        await until_served(replica, versions[1])

    with_replica(work())


def test_a_channel_is_followed_there_and_back(folders: list[Path], versions: list[str], tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "models")
    names = [register(storage, open_storage(folder), folder).version for folder in folders]
    promote(storage, names[0], "stable")

    async def work() -> None:
        replica = ModelReplica(1, "cpu", 60.0)
        await replica.reconfigure(config(Path(f"{storage.url}@stable"), follow_s=0.1))
        assert (await replica.describe())["model_version"] == versions[0]
        promote(storage, names[1], "stable")
        await until_served(replica, versions[1])
        model = replica._models[None]
        await asyncio.sleep(0.5)
        # Looked at again and again, loaded once.
        assert replica._models[None] is model
        rollback(storage, "stable")
        await until_served(replica, versions[0])

    with_replica(work())


def test_a_batch_that_hangs_makes_the_replica_unhealthy(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        replica = ModelReplica(1, "cpu", 0.2)
        await replica.reconfigure(config(folders[0]))
        outcomes = replica._outcomes

        def slow(asked: list[Any]) -> list[Any]:
            time.sleep(1.0)
            return outcomes(asked)

        monkeypatch.setattr(replica._batches, "_read", slow)
        asked = asyncio.create_task(replica.report(PICTURE))
        await asyncio.sleep(0)
        replica.check_health()
        await asyncio.sleep(0.6)
        with pytest.raises(ServeError, match="batch"):
            replica.check_health()
        await asked
        replica.check_health()

    with_replica(work())


def test_the_models_stand_in_user_config_alone() -> None:
    """Another checkpoint must not change what replicas are built with, or Serve would start them anew."""
    one, other = (build_app(ServeSettings(checkpoint_url=url)) for url in ("a", "b"))
    model = one._bound_deployment.init_args[0]._bound_deployment
    other_model = other._bound_deployment.init_args[0]._bound_deployment
    assert model.init_args == other_model.init_args
    assert one._bound_deployment.init_args[1] == other._bound_deployment.init_args[1]
    assert (model.user_config["checkpoint_url"], other_model.user_config["checkpoint_url"]) == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, 8), ({"latency_target_s": 2.0}, 2), ({"latency_target_s": 2.0, "target_ongoing_requests": 5}, 5)]
)
def test_replicas_are_added_at_less_than_admission_lets_in(changes: dict[str, Any], expected: float) -> None:
    app = build_app(ServeSettings(checkpoint_url="a", max_batch_size=8, max_replicas=2, **changes))
    autoscaling = app._bound_deployment.init_args[0]._bound_deployment._deployment_config.autoscaling_config
    assert autoscaling.target_ongoing_requests == expected
