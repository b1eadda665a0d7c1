"""Model replicas that die with requests in them, on a real Ray Serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest
from dicom_nodes import until
from tiny_model import encoded_film, tiny_model_folder

from benchmarks.gateway_chaos import TARGETS, processes
from serve.app import run_server
from serve.settings import ServeSettings
from ssacl.inference.generator import GenerationOptions

# Long enough to be met half way.
SLOW = GenerationOptions(num_beams=3, max_new_tokens=180, min_new_tokens=180)
MODEL_REPLICA = TARGETS["model replica"]

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = tiny_model_folder(tmp_path_factory.mktemp("model") / "model")
    settings = ServeSettings(
        checkpoint_url=str(model),
        port=0,
        min_replicas=2,
        max_replicas=2,
        cpus_per_replica=0.5,
        num_threads=1,
        max_batch_size=2,
        generation=SLOW,
    )
    with run_server(settings, blocking=False) as running:
        yield running.url


async def post(client: httpx.AsyncClient, seed: int) -> httpx.Response:
    return await client.post("/v1/reports?maps=false", files={"file": encoded_film("PNG", seed=seed)})


def test_a_request_whose_replica_dies_is_answered_by_another(server: str) -> None:
    async def work() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server, timeout=120) as client:
            asked = [asyncio.create_task(post(client, seed)) for seed in range(8)]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            # Both replicas have a batch now, so that whichever dies has requests in it.
            processes(MODEL_REPLICA)[0].kill()
            return await asyncio.gather(*asked)

    assert [answer.status_code for answer in asyncio.run(work())] == [200] * 8


def test_a_request_that_every_replica_dies_with_is_refused_for_now(server: str) -> None:
    until(lambda: len(processes(MODEL_REPLICA)) == 2)

    async def work() -> httpx.Response:
        async with httpx.AsyncClient(base_url=server, timeout=120) as client:
            await post(client, 1)
            asked = asyncio.create_task(post(client, 2))
            end = time.monotonic() + 100
            while not asked.done() and time.monotonic() < end:
                ready = await client.get("/readyz")
                if ready.status_code == 200 and not asked.done():
                    for process in processes(MODEL_REPLICA):
                        process.kill()
                await asyncio.sleep(0.1)
            return await asked

    answer = asyncio.run(work())
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:ssacl:problem:not-ready"
    # It was refused for now: replicas come back, and the same film is read.
    until(lambda: httpx.get(f"{server}/readyz", timeout=10).status_code == 200)
    assert httpx.post(f"{server}/v1/reports", files={"file": encoded_film("PNG", seed=2)}, timeout=60).status_code == 200
