"""The loop: all stages, exact resume, thresholds, metrics; and that no training path can open the test split or the truth."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_set import NUM_SAMPLES, tiny_config, tiny_tree, write_training_set

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.config import Config
from ssacl.data.loader import open_split
from ssacl.data.storage import open_storage
from ssacl.errors import CheckpointError, SplitError, TrainingError
from ssacl.training.checkpoint import load_model_folder
from ssacl.training.curves import curves_png
from ssacl.training.loop import TrainingOutcome, train
from ssacl.training.reporter import LogReporter, MetricsLog, describe
from ssacl.training.resume import Position, RunStore
from ssacl.training.thresholds import FALLBACK_THRESHOLD, best_f1_threshold, choose_thresholds

ROOT = Path(__file__).parents[1]


class StopHereError(Exception):
    """Raised by `StoppingReporter` in the place of a crash."""


class StoppingReporter:
    """Hears everything; breaks off the run after a given step of a given stage."""

    def __init__(self, stage: str = "", step: int = -1) -> None:
        self.stop, self.heard = (stage, step), []

    def progress(self, record) -> None:
        self.heard.append(dict(record))
        if (record.get("stage"), record.get("step")) == self.stop:
            raise StopHereError

    def milestone(self, record) -> None:
        self.heard.append(dict(record))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, TrainingOutcome, StoppingReporter]:
    config = tiny_config(data, tmp_path_factory.mktemp("runs"))
    reporter = StoppingReporter()
    return config, train(config, reporter), reporter


def test_all_three_stages_end_in_a_model_folder(finished):
    config, outcome, _ = finished
    steps = [(r["stage"], r["step"]) for r in outcome.metrics if r["event"] == "step"]
    assert steps == [
        (kind, step) for kind, count in (("contrastive", 6), ("generation", 4), ("findings", 4)) for step in range(1, count + 1)
    ]
    assert all(math.isfinite(value) for r in outcome.metrics for value in r.get("losses", {}).values())
    loaded = load_model_folder(outcome.model_url)
    assert loaded.config == config
    assert set(loaded.thresholds) == set(FINDINGS)
    assert loaded.manifest["provenance"]["stages"] == ["contrastive", "generation", "findings"]
    assert set(loaded.manifest["metrics"]["validation"]) == {"contrastive", "generation", "findings"}


def test_metrics_are_stored_with_units(finished):
    config, outcome, reporter = finished
    lines = (Path(config.run.storage_url) / "tiny" / MetricsLog.KEY).read_text().splitlines()
    assert [json.loads(line) for line in lines] == outcome.metrics
    step = next(record for record in outcome.metrics if record["event"] == "step")
    assert {"stage", "step", "losses", "lr", "images_per_s", "data_wait_share", "elapsed_s", "remaining_s", "gradient_norm"} <= step.keys()
    assert 0 <= step["data_wait_share"] <= 1
    assert "grounding/order" in step["losses"]
    assert [r for r in reporter.heard if r["event"] == "step"] == [r for r in outcome.metrics if r["event"] == "step"]
    assert "images/s" in describe(step)


def test_the_same_command_on_a_finished_run_trains_nothing(finished):
    config, outcome, _ = finished
    reporter = StoppingReporter()
    again = train(config, reporter)
    assert reporter.heard == []
    assert again.manifest == outcome.manifest


def test_the_losses_fall(data, tmp_path):
    stages = [{"kind": "findings", "num_steps": 30, "lr": 0.01}]
    outcome = train(tiny_config(data, tmp_path, run={"stages": stages}), LogReporter())
    losses = [record["losses"]["total"] for record in outcome.metrics if record["event"] == "step"]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("stop", [("contrastive", 4), ("contrastive", 6), ("generation", 2), ("generation", 4)])
def test_an_interrupted_run_continues_bit_for_bit(finished, data, tmp_path, stop):
    _, outcome, _ = finished
    config = tiny_config(data, tmp_path)
    with pytest.raises(StopHereError):
        train(config, StoppingReporter(*stop))
    reporter = StoppingReporter()
    resumed = train(config, reporter)
    assert len([r for r in reporter.heard if r["event"] == "step"]) < 14
    whole, other = ([(r["stage"], r["step"], r["losses"]) for r in o.metrics if r["event"] == "step"] for o in (outcome, resumed))
    assert other == whole
    assert resumed.manifest["model_version"] == outcome.manifest["model_version"]


def test_a_name_in_use_with_other_settings_is_refused_with_the_keys(data, tmp_path):
    with pytest.raises(StopHereError):
        train(tiny_config(data, tmp_path), StoppingReporter("generation", 1))
    with pytest.raises(CheckpointError, match=r"optim\.lr \(0\.001 in the checkpoint, 0\.5 now\).*run\.name"):
        train(tiny_config(data, tmp_path, optim={"lr": 0.5}), StoppingReporter())


def test_checkpoints_are_pruned_and_incomplete_ones_are_invisible(data, tmp_path):
    with pytest.raises(StopHereError):
        train(tiny_config(data, tmp_path, run={"keep_last": 2}), StoppingReporter("generation", 4))
    store = RunStore(open_storage(str(tmp_path)).sub("tiny"))
    assert store.positions() == [Position(1, 0), Position(1, 3)]
    store.storage.delete("checkpoints/01-00000003/manifest.json")
    found = store.latest()
    assert found is not None
    assert found[0] == Position(1, 0)


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    config = tiny_config(data, tmp_path)
    with pytest.raises(StopHereError):
        train(config, StoppingReporter("contrastive", 4))
    path = tmp_path / "tiny" / "checkpoints" / "00-00000003" / "state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"damaged.*state\.pt"):
        train(config, StoppingReporter())


def test_a_diverging_run_stops_by_name(data, tmp_path):
    config = tiny_config(data, tmp_path, optim={"lr": 1e30, "clip_norm": 0.0, "warmup_share": 0.0})
    with pytest.raises(TrainingError, match="Not finite at step"):
        train(config, StoppingReporter())
    assert not (tmp_path / "tiny" / "model").exists()


def test_curves_show_every_stage(finished):
    picture = curves_png(finished[1].metrics)
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    with pytest.raises(TrainingError, match="no training step"):
        curves_png([])


def test_thresholds_separate_and_fall_back():
    probability = np.array([0.9, 0.8, 0.3, 0.25, 0.1])
    assert best_f1_threshold(probability, np.array([1, 1, 1, 0, 0], dtype=bool)) == pytest.approx(0.275)
    assert best_f1_threshold(probability, np.array([1, 0, 0, 0, 0], dtype=bool)) == FALLBACK_THRESHOLD
    assert best_f1_threshold(np.full(4, 0.2), np.array([1, 1, 1, 0], dtype=bool)) < 0.2


def test_uncertain_findings_follow_the_policy():
    status = np.full((6, len(FINDINGS)), int(FindingStatus.ABSENT))
    status[:3, 4] = int(FindingStatus.PRESENT)
    status[3, 4] = int(FindingStatus.UNCERTAIN)
    probabilities = np.tile(np.array([0.9, 0.8, 0.7, 0.6, 0.2, 0.1])[:, None], (1, len(FINDINGS)))
    chosen = {policy: choose_thresholds(probabilities, status, policy)["Edema"] for policy in ("present", "absent", "ignore")}
    assert chosen == {"present": pytest.approx(0.4), "absent": pytest.approx(0.65), "ignore": pytest.approx(0.45)}


@pytest.mark.parametrize("purpose", ["training", "validation"])
def test_training_cannot_open_the_test_split_or_the_truth(data, purpose):
    storage = open_storage(str(data))
    assert len(open_split(storage, "train", purpose)) == NUM_SAMPLES["train"]
    for split in ("test", "truth", "../set_truth"):
        with pytest.raises(SplitError):
            open_split(storage, split, purpose)


def test_a_training_run_opens_neither_test_shards_nor_truth(data, tmp_path):
    """Every file that the process opens, imports included, by the interpreter's own audit."""
    truth = data.parent / f"{data.name}_truth"
    truth.mkdir()
    (truth / "masks.npz").write_bytes(b"secret")
    script = """
import json, sys
opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event in ("open", "os.listdir", "os.scandir") else None)
from ssacl.config import parse_config
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter
train(parse_config(json.loads(sys.argv[1])), LogReporter())
print(json.dumps(opened))
"""
    tree = tiny_tree(data, tmp_path / "runs")
    done = subprocess.run([sys.executable, "-c", script, json.dumps(tree)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    opened = json.loads(done.stdout.splitlines()[-1])
    assert any("train-000000.tar" in name for name in opened)
    assert any("val-000000.tar" in name for name in opened)
    assert [name for name in opened if "test-" in Path(name).name or "_truth" in name] == []


def test_plain_python_runs_it(data, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(tiny_config(data, tmp_path / "runs", run={"stages": [{"kind": "joint", "num_steps": 2}]}).to_yaml())

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        # A process of its own: DeepSpeed keeps the process group that it saw first for the life of the process.
        command = [sys.executable, "-m", "ssacl.training", "--config", str(path), *overrides]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT, check=False)

    done = run("engine.kind=deepspeed", "engine.zero_stage=1")
    assert done.returncode == 0, done.stderr
    assert "model:" in done.stdout
    refused = run("optim.speed=1")
    assert refused.returncode == 1
    assert "optim.speed" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_two_ray_workers_with_zero_2(data, tmp_path, monkeypatch):
    from ray_jobs.train import run_training

    # Paths of a configuration count from where the command was given.
    monkeypatch.chdir(data.parent)

    stages = [{"kind": "contrastive", "num_steps": 3}, {"kind": "generation", "num_steps": 2}, {"kind": "findings", "num_steps": 2}]
    config = tiny_config(
        Path(data.name),
        Path("runs"),
        engine={"kind": "deepspeed", "zero_stage": 2, "micro_batch_size": 2},
        run={"stages": stages, "num_train_workers": 2, "checkpoint_every_steps": 2},
    )
    result = run_training(config, progress=False, out_folder=tmp_path / "out")
    assert result.curves_png.read_bytes().startswith(b"\x89PNG")
    assert [r["step"] for r in result.metrics if r["event"] == "step"] == [1, 2, 3, 1, 2, 1, 2]
    manifest = load_model_folder(result.model_url).manifest
    assert manifest["provenance"]["world_size"] == 2
    # One process sees the same samples: the first step's loss is the same but for dropout.
    alone = train(tiny_config(data, tmp_path / "alone", run={"stages": stages}), LogReporter())
    assert result.metrics[0]["losses"]["total"] == pytest.approx(alone.metrics[0]["losses"]["total"], rel=0.05)
