"""The dry run: what it counts is what the run has, and a language model of billions costs no memory."""

import resource
from pathlib import Path

import pytest
import yaml
from training_set import NUM_SAMPLES, tiny_config, tiny_tree, write_training_set

from ssacl.cli import main
from ssacl.config import load_config, parse_config
from ssacl.data.tokenization import Tokenizers
from ssacl.errors import DataError, SplitError
from ssacl.models.ssacl import SSACL
from ssacl.training.__main__ import main as plain_main
from ssacl.training.dry_run import dry_run
from ssacl.training.footprint import rank_memory

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("dry") / "set")


def test_the_whole_text_is_the_configuration_again(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path)
    assert parse_config(yaml.safe_load(dry_run(config, 2))) == config
    assert not list(tmp_path.iterdir())


def test_parameters_are_those_of_the_model(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path)
    model = SSACL.from_config(config, Tokenizers.load(data))
    rows = dict(line.split()[1:3] for line in dry_run(config, 2).splitlines() if len(line.split()) == 3)
    counted = {name: int(count.replace(",", "")) for name, count in rows.items() if name in dict(model.named_children()) or name == "all"}
    assert counted.pop("all") == sum(parameter.numel() for parameter in model.parameters())
    for name, count in counted.items():
        assert count == sum(parameter.numel() for parameter in model.get_submodule(name).parameters()), name
    assert {"encoder", "text", "language", "findings_head"} <= counted.keys()


def test_steps_come_from_the_index(data: Path, tmp_path: Path) -> None:
    stages = [{"kind": "joint", "num_epochs": 10}, {"kind": "findings", "num_steps": 7}]
    text = dry_run(tiny_config(data, tmp_path, run={"stages": stages}), 2)
    # 20 samples, 2 ranks x 4: two whole passes an epoch.
    assert f"{NUM_SAMPLES['train']} samples, 2 passes an epoch" in text
    assert "stage 1, joint: 20 steps (1 warm-up), 10.0 epochs" in text
    assert "stage 2, findings: 7 steps" in text
    assert "Before this can run here" not in text
    with pytest.raises(DataError, match="fewer than one batch over all ranks"):
        dry_run(tiny_config(data, tmp_path), 6)


def test_what_cannot_be_reached_is_said(tmp_path: Path) -> None:
    text = dry_run(tiny_config(tmp_path / "absent", tmp_path), 1)
    assert "- data.url: No data set at" in text
    assert "- Tokenizers: No tokenizers at" in text
    assert "stage 1, contrastive: 6 steps" in text


def test_training_data_only(data: Path, tmp_path: Path) -> None:
    truth = data.with_name("set_truth")
    truth.mkdir()
    with pytest.raises(SplitError):
        dry_run(tiny_config(truth, tmp_path), 1)


def test_a_model_of_seven_billion_is_counted_without_being_made() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = dry_run(load_config(ROOT / "configs" / "mimic_cxr_large_lm.yaml"), 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "KiB"
    language = next(line.split()[2] for line in text.splitlines() if line.startswith("#   language"))
    # LLaMA 7B has 6.74e9; LoRA of rank 16 on two of its projections adds 32 x 2 x 16 x 8192.
    assert int(language.replace(",", "")) == 6_738_415_616 + 32 * 2 * 16 * 8192
    assert "'models/llm_7b' is no folder here" in text
    assert "not built" not in text
    # Divided by 8 ranks, weights, gradients and AdamW take less than the weights alone would whole.
    whole, divided = ([float(value) for value in line.split()[2:6]] for line in text.splitlines() if line.startswith(("#   2 ", "#   3 ")))
    assert divided[3] < whole[0]
    assert "#   3 " in text.split("<- deepspeed")[0].splitlines()[-1]


def test_memory_by_hand() -> None:
    by_stage = [rank_memory(100, 60, stage, 4) for stage in range(4)]
    assert [m.device for m in by_stage] == [400 + 240 + 480, 400 + 240 + 180, 400 + 60 + 180, 100 + 400 + 60 + 180]
    assert rank_memory(100, 60, 3, 4, num_divisible=80).device == 100 + 80 + 60 + 180
    moved = rank_memory(100, 60, 2, 4, offload=True)
    assert (moved.device, moved.host) == (460, 180)


def test_both_commands_print_it(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(data, tmp_path / "runs")))
    assert main(["train", "--config", str(path), "--dry-run", "run.num_train_workers=2"]) == 0
    assert "Dry run for 2 ranks" in capsys.readouterr().out
    assert plain_main(["--config", str(path), "--dry-run"]) == 0
    assert "Dry run for 1 rank:" in capsys.readouterr().out
    assert main(["train", "--config", str(path), "--dry-run", "run.stages=[]", "optim.speed=1"]) == 1
    assert not (tmp_path / "runs").exists()
