"""Whatever is sent: no 5xx, a problem for what is refused, bounded time and memory, nothing of anybody left behind."""

from __future__ import annotations

import asyncio
import logging
import resource
import tempfile
import time
from pathlib import Path

import httpx
import pytest
from api_calls import made_api
from hostile_uploads import PLANTED, hostile_uploads
from report_endpoint import InProcess
from tiny_model import tiny_model_folder

MAX_SECONDS, MAX_GROWTH_BYTES = 20.0, 1 << 30


@pytest.mark.slow
def test_hostile_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gateway = InProcess(tiny_model_folder(tmp_path / "model"))
    scratch, log, kept = tmp_path / "scratch", tmp_path / "audit.jsonl", tmp_path / "kept"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    caplog.set_level(logging.DEBUG)
    api = made_api(gateway, audit_file=str(log), kept={"url": str(kept)})
    uploads = list(hostile_uploads())
    assert len(uploads) > 200
    assert len({name for name, _, _ in uploads}) == len(uploads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers: dict[str, httpx.Response] = {}
    slowest = 0.0

    async def send() -> str:
        nonlocal slowest
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://endpoint", timeout=120) as client:
            for name, kind, content in uploads:
                started = time.monotonic()
                answers[name] = await client.post("/v1/reports?maps=false", content=content, headers={"content-type": kind} if kind else {})
                slowest = max(slowest, time.monotonic() - started)
            return (await client.get("/metrics")).text

    metrics = asyncio.run(send())
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    failed = {name: answer.text for name, answer in answers.items() if answer.status_code not in (200, 400, 413, 415, 422)}
    assert failed == {}
    refused = [answer for answer in answers.values() if answer.status_code != 200]
    # Some changed bytes are pixels or of no consequence: those films are read.
    assert len(refused) > 200
    for answer in refused:
        assert answer.headers["content-type"] == "application/problem+json"
        assert len(answer.json()["detail"]) > 10
    assert slowest < MAX_SECONDS
    assert grown < MAX_GROWTH_BYTES
    assert len(log.read_text().splitlines()) == len(uploads) + 1
    assert list(scratch.iterdir()) == []
    assert not kept.exists()
    told = "\n".join([caplog.text, metrics, log.read_text(), *(answer.text for answer in answers.values())])
    assert [hidden for hidden in (*PLANTED, "passwd", "Traceback") if hidden in told] == []
