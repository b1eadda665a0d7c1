"""What a person sees of a run: the live line, units, work and memory, TensorBoard, sample reports; and that one name is one live run."""

import io
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_model import random_batch, small_config, small_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from training_set import tiny_config, write_training_set

from ssacl.config import Config
from ssacl.data.lease import BusyError
from ssacl.training.engine import make_engine
from ssacl.training.loop import HOLDER, TrainingOutcome, train
from ssacl.training.reporter import LogReporter, describe
from ssacl.training.speed import matmul_peak, step_work
from ssacl.training.stages import plan_stages

ROOT = Path(__file__).parents[1]
STAGES = [{"kind": "contrastive", "num_steps": 2}, {"kind": "generation", "num_steps": 2}, {"kind": "findings", "num_steps": 2}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def told(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, TrainingOutcome, str]:
    """A run and what it logged."""
    config = tiny_config(data, tmp_path_factory.mktemp("runs"), run={"stages": STAGES})
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("ssacl").addHandler(handler)
    logging.getLogger("ssacl").setLevel(logging.INFO)
    try:
        outcome = train(config, LogReporter())
    finally:
        logging.getLogger("ssacl").removeHandler(handler)
    return config, outcome, stream.getvalue()


def run_folder(config: Config) -> Path:
    return Path(config.run.storage_url) / config.run.name


def test_a_line_has_all_that_is_asked_for(told: tuple[Config, TrainingOutcome, str]) -> None:
    config, outcome, log = told
    step = next(record for record in outcome.metrics if record["event"] == "step")
    assert {"images_per_s", "data_wait_share", "mfu_share", "memory_gib", "remaining_s", "elapsed_s", "lr"} <= step.keys()
    assert 0 < step["mfu_share"] < 1.5
    assert 0.05 < step["memory_gib"] < 64
    line = describe(step | {"remaining_s": 5400.0})
    for part in ("contrastive 1/2", "ir ", "images/s", "data wait", "MFU", "GiB", "90 min left"):
        assert part in line
    assert log.count(f"tensorboard --logdir {run_folder(config)}/tensorboard") == 2, "at the start and at the end"


def test_event_files_hold_the_metrics(told: tuple[Config, TrainingOutcome, str]) -> None:
    config, outcome, _ = told
    events = EventAccumulator(str(run_folder(config) / "tensorboard"))
    events.Reload()
    assert {"training/total", "validation/total", "step/images_per_s", "step/mfu_share", "step/memory_gib"} <= set(events.Tags()["scalars"])
    written = [(event.step, event.value) for event in events.Scalars("training/total")]
    kept = [(r["run_step"], r["losses"]["total"]) for r in outcome.metrics if r["event"] == "step"]
    assert [step for step, _ in written] == [1, 2, 3, 4, 5, 6] == [step for step, _ in kept]
    assert [value for _, value in written] == pytest.approx([value for _, value in kept], rel=1e-6)


def test_validation_leaves_a_report_and_its_evidence(told: tuple[Config, TrainingOutcome, str]) -> None:
    folder = run_folder(told[0]) / "samples"
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{stem}.{kind}" for stem in ("01-generation-00000002", "02-findings-00000002") for kind in ("txt", "png")}
    for name in names:
        if name.endswith("png"):
            assert Image.open(folder / name).width >= 48
        else:
            text = (folder / name).read_text()
            assert "Findings head:" in text
            assert not any(key in text for key in ("val0000", "pval"))


def test_samples_and_measuring_change_no_number(told: tuple[Config, TrainingOutcome, str], data: Path, tmp_path: Path, monkeypatch) -> None:
    """The same run without them: bit for bit the same losses and weights."""
    monkeypatch.setattr("ssacl.training.loop.step_work", lambda engine, model, batch: 1.0)
    monkeypatch.setattr("ssacl.training.samples.SampleReports.write", lambda *arguments: None)
    monkeypatch.setattr("ssacl.training.loop.training_peak", lambda precision, device: 1.0)
    plain = train(tiny_config(data, tmp_path, run={"stages": STAGES}), LogReporter())
    losses = [[(r["run_step"], r["losses"]) for r in o.metrics if r["event"] == "step"] for o in (told[1], plain)]
    assert losses[0] == losses[1]
    assert told[1].manifest["model_version"] == plain.manifest["model_version"]


@pytest.mark.parametrize("stage", [{"kind": "joint"}, {"kind": "contrastive"}, {"kind": "generation", "freeze_encoder": True}])
def test_work_is_what_a_step_executes(stage: dict) -> None:
    config = small_config(run__stages=[stage | {"num_steps": 1}], engine__kind="torch", engine__precision="fp32")
    model, batch = small_model(config), random_batch(3, config)
    plan = replace(plan_stages(config, 10)[0], warmup_steps=0)
    engine = make_engine(model, config, plan)
    counted = step_work(engine, model, batch)
    with FlopCounterMode(display=False) as counter:
        engine.step([batch], 1.0)
    # Images and stopped targets have no gradient; the count gives them one.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_the_peak_leaves_random_numbers_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert matmul_peak(torch.float32, torch.device("cpu"), (64,), 1) > 0
    assert torch.equal(torch.get_rng_state(), before)


class StopHereError(Exception):
    """Ends a run after its first step."""


class OneStep(LogReporter):
    def progress(self, record) -> None:
        if record["event"] == "step":
            raise StopHereError


def test_a_name_belongs_to_one_live_run_and_to_the_next_after_its_death(data: Path, tmp_path: Path, monkeypatch) -> None:
    config = tiny_config(data, tmp_path / "runs", run={"stages": [{"kind": "contrastive", "num_steps": 100_000}]})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    script = "import sys, ssacl.data.lease as lease; lease.HEARTBEAT_S = 0.2; from ssacl.training.__main__ import main; main(sys.argv[1:])"
    first = subprocess.Popen([sys.executable, "-c", script, "--config", str(tmp_path / "config.yaml")], stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        give_up_at = time.monotonic() + 120
        while not (run_folder(config) / HOLDER.key).exists():
            assert time.monotonic() < give_up_at
            assert first.poll() is None
            time.sleep(0.1)
        with pytest.raises(BusyError, match=r"Another training run is writing into .*tiny.*choose another run\.name"):
            train(config, OneStep())
    finally:
        first.kill()
        first.wait()
    started = time.monotonic()
    with pytest.raises(StopHereError):
        train(config, OneStep())
    assert time.monotonic() - started < 30, "a dead process of this machine is not waited for"
    assert not (run_folder(config) / HOLDER.key).exists()


def test_a_run_that_died_elsewhere_is_taken_over_when_its_heartbeat_stands_still(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ssacl.data.lease.PATIENCE_S", 0.5)
    config = tiny_config(data, tmp_path, run={"stages": STAGES})
    run_folder(config).mkdir()
    (run_folder(config) / HOLDER.key).write_text('{"run": "other", "process": "elsewhere 1@1"}')
    with pytest.raises(StopHereError):
        train(config, OneStep())


def test_a_run_whose_name_was_taken_stores_no_checkpoint(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path, run={"stages": STAGES, "checkpoint_every_steps": 1})

    class Robbed(LogReporter):
        def progress(self, record) -> None:
            if record["event"] == "step":
                (run_folder(config) / HOLDER.key).write_text('{"run": "other", "process": "elsewhere 1@1"}')

    with pytest.raises(BusyError):
        train(config, Robbed())
    assert not (run_folder(config) / "checkpoints").exists()
