"""Storage that fails in the middle of a run: waited for, or the run stops by name, and the same command goes on as if nothing had been."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_s3 import FaultyS3, faulty_s3
from ranks import run_ranks
from training_set import tiny_config, tiny_tree, write_training_set

from ssacl.config import Config, parse_config
from ssacl.data.storage import embedded_s3
from ssacl.errors import SSACLError
from ssacl.training.loop import TrainingOutcome, train
from ssacl.training.reporter import LogReporter

STAGES = [{"kind": "contrastive", "num_steps": 8}]


class At(LogReporter):
    """Does something after a step."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        super().__init__()
        self._step, self._act = step, act

    def progress(self, record) -> None:
        if record["event"] == "step" and record["step"] == self._step:
            self._act()


def steps(outcome: TrainingOutcome) -> list[tuple[int, dict[str, float]]]:
    return [(r["step"], r["losses"]) for r in outcome.metrics if r["event"] == "step"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingOutcome:
    return train(tiny_config(data, tmp_path_factory.mktemp("whole"), run={"stages": STAGES}), LogReporter())


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """An S3 server that breaks when it is told to; a try costs nothing, and few are made without patience."""
    monkeypatch.setattr("ssacl.data.s3_storage.NUM_TRIES", 2)
    monkeypatch.setattr("ssacl.data.s3_storage.time.sleep", lambda _: None)
    with embedded_s3(tmp_path / "s3") as server, faulty_s3(server, share=0.0) as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def s3_config(data: Path, patience_s: float) -> Config:
    run = {"stages": STAGES, "storage_patience_s": patience_s}
    return tiny_config(data, "s3://ssacl/runs", run=run)


def set_attribute(proxy: FaultyS3, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(proxy, name, value)


@pytest.mark.external
def test_a_store_that_is_away_for_a_while_is_waited_for(data: Path, whole: TrainingOutcome, proxy: FaultyS3) -> None:
    outcome = train(s3_config(data, patience_s=60.0), At(2, set_attribute(proxy, "down_for", 40)))
    assert proxy.injected["down"] == 40
    assert steps(outcome) == steps(whole)
    assert outcome.manifest["model_version"] == whole.manifest["model_version"]


@pytest.mark.external
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("down", True, "does not answer or breaks off"), ("refusal", "ExpiredToken", r"\(ExpiredToken\).*AWS_SESSION_TOKEN.*run again")],
)
def test_a_store_that_stays_away_or_refuses_stops_the_run_by_name(
    name: str, value: Any, said: str, data: Path, whole: TrainingOutcome, proxy: FaultyS3
) -> None:
    config = s3_config(data, patience_s=0.5)
    with pytest.raises(SSACLError, match=said):
        train(config, At(5, set_attribute(proxy, name, value)))
    setattr(proxy, name, type(value)())
    heard: list[int] = []
    outcome = train(config, At(4, lambda: heard.append(4)))
    assert heard == [4], "goes on at the checkpoint of step 3"
    assert steps(outcome) == steps(whole)
    assert outcome.manifest["model_version"] == whole.manifest["model_version"]


def fill_disk() -> None:
    """No file may grow beyond 4 KiB from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def train_on_a_full_disk(world_rank: int, world_size: int, tree: dict[str, Any], full_rank: int, out: str) -> None:
    said = "nothing"
    try:
        train(parse_config(tree), At(4, fill_disk) if world_rank == full_rank else LogReporter(), world_rank, world_size)
    except SSACLError as error:
        said = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    Path(f"{out}-{world_rank}").write_text(said)


@pytest.mark.parametrize("kind", ["torch", "deepspeed"])
def test_no_space_for_a_checkpoint_stops_every_rank_by_name(kind: str, data: Path, tmp_path: Path) -> None:
    tree = tiny_tree(data, tmp_path / "runs")
    tree["engine"] |= {"kind": kind, "global_batch_size": 4}
    tree["run"]["stages"] = STAGES
    run_ranks(train_on_a_full_disk, 2, tmp_path / "ranks", tree, 0, str(tmp_path / "said"))
    for rank in range(2):
        assert "CheckpointError: The checkpoint checkpoints/00-00000006 could not be stored" in (tmp_path / f"said-{rank}").read_text()
        assert "Free space" in (tmp_path / f"said-{rank}").read_text()
    left = [path.parent.name for path in sorted((tmp_path / "runs").glob("tiny/checkpoints/*/manifest.json"))]
    assert left == ["00-00000003"]
    run_ranks(train_on_a_full_disk, 2, tmp_path / "again", tree, -1, str(tmp_path / "said"))
    assert (tmp_path / "said-0").read_text() == (tmp_path / "said-1").read_text() == "nothing"
    metrics = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in metrics if r["event"] == "step"] == list(range(1, 9))
