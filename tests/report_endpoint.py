"""The HTTP interface over a real tiny model without Ray, in this process, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn

from serve.ingress import build_api
from serve.settings import ServeSettings
from ssacl.data.dicom import Picture
from ssacl.inference.generator import GenerationOptions, ReportGenerator
from ssacl.inference.report import DraftReport

FAST = GenerationOptions(num_beams=1, max_new_tokens=12)


class InProcess:
    """A gateway to a model without Ray: the generator itself."""

    def __init__(self, folder: Path, options: GenerationOptions = FAST) -> None:
        torch.set_num_threads(1)
        self.generator, self.options = ReportGenerator.load(folder), options
        self.num_reports = 0

    async def report(self, picture: Picture, model: str | None = None) -> DraftReport:
        self.num_reports += 1
        return self.generator.generate([picture], self.options)[0]

    async def describe(self) -> dict[str, Any]:
        return self.generator.describe()

    async def describe_all(self) -> list[dict[str, Any]]:
        return [{**self.generator.describe(), "name": None}]


@contextmanager
def running_endpoint(gateway: Any, port: int) -> Iterator[str]:
    """The interface on a port of this machine; gone at the end of the block."""
    api = build_api(gateway, ServeSettings(checkpoint_url="unused", generation=FAST))
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}/v1/reports"
    finally:
        server.should_exit = True
        thread.join(30)
