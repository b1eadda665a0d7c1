"""`make demo`, small: from nothing to a served report, every process ended at its end and on Ctrl-C in its middle."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssacl.training.checkpoint import load_model_folder

ROOT = Path(__file__).parents[1]
STAGES = "[{kind: contrastive, num_steps: 4}, {kind: findings, num_steps: 3}, {kind: generation, num_steps: 3, freeze_encoder: true}]"
SMALL = [f"run.stages={STAGES}", "engine.micro_batch_size=8", "run.log_every_steps=1", "run.validate_every_steps=100"]
SCORES = ("findings_f1_micro_14", "findings_f1_macro_14", "clinical_f1_micro_14", "clinical_f1_macro_14", "bleu_4", "rouge_l")
SCORES += ("left_lung_pointing", "right_lung_pointing", "all_iou")
"""What metrics.json must hold, each beside its baseline."""
MARK = "SSACL_TEST_DEMO"

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.external, pytest.mark.timeout(420)]


@contextmanager
def demo(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A small demo whose every descendant carries a mark in its environment; ends what a failing test leaves."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    environment |= {MARK: str(folder), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ray_jobs.demo", "--out", str(folder / "out"), "--num-studies", "60", *SMALL]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
        try:
            yield process
        finally:
            for pid in alive(folder):
                os.kill(pid, signal.SIGKILL)
            process.wait(30)


def alive(folder: Path) -> list[int]:
    """Processes that descend from the demo of `folder`, whatever session or parent they have now."""
    mark, found = f"{MARK}={folder}".encode(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # Gone, or not ours.
    return found


def nothing_left(folder: Path, patience_s: float = 20.0) -> bool:
    deadline = time.monotonic() + patience_s
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not alive(folder)


def log_of(folder: Path) -> str:
    return (folder / "log").read_text(errors="replace")


def test_the_demo_leaves_its_files_and_no_process(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        assert process.wait(400) == 0, log_of(tmp_path)[-3000:]
        assert nothing_left(tmp_path)
    out, text = tmp_path / "out", log_of(tmp_path)
    for name in ("evidence.png", "training.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "preliminary"
    assert len(report["findings"]) == 14
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(SCORES) <= set(metrics["metrics"])
    rows = {row["figure"]: row for row in metrics["rows"]}
    assert [name for name in SCORES if rows[name]["baseline"] is None or not rows[name]["baseline_name"]] == []
    assert metrics["data"]["split"] == "test"
    assert len(metrics["seconds"]) == 6
    assert all(seconds >= 0 for seconds in metrics["seconds"].values())
    for part in metrics["seconds"]:
        assert f"=== {part}" in text
    printed = re.search(r"ssacl serve --checkpoint (\S+)", text)
    assert printed is not None
    assert load_model_folder(printed[1]).manifest["provenance"]["world_size"] == 2
    film = re.search(r"file=@(\S+)", text)
    assert film is not None
    assert Path(film[1]).is_file()
    assert "Traceback" not in text


@pytest.mark.parametrize("when", ["=== ingest", "contrastive 2/4"])
def test_ctrl_c_in_the_middle_leaves_no_process(when: str, tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        deadline = time.monotonic() + 240
        while when not in log_of(tmp_path) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert when in log_of(tmp_path)
        assert len(alive(tmp_path)) > 3, "Ray and the S3 server are up"
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 130, log_of(tmp_path)[-3000:]
        assert nothing_left(tmp_path)
    assert "interrupted; everything it had started is stopped" in log_of(tmp_path)
    assert not (tmp_path / "out" / "metrics.json").exists()
