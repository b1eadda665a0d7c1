"""ZeRO 3 on two ranks: the language model is divided from its construction on, and every number is that of the plain engine."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training_set import tiny_tree, write_training_set
from transformers import GPT2Config, GPT2LMHeadModel

from ssacl.config import Config, parse_config
from ssacl.data.collate import Collator
from ssacl.data.records import Batch
from ssacl.data.shards import ShardIndex, read_sample
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers
from ssacl.errors import CheckpointError
from ssacl.models.divided import fill_shares, full_size, is_divided, whole_state
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import export_weights, load_model_folder, load_weights
from ssacl.training.deepspeed_engine import construction
from ssacl.training.engine import Engine, make_engine
from ssacl.training.loop import train
from ssacl.training.reporter import LogReporter
from ssacl.training.stages import plan_stages

ROWS = 2
PLAIN, ZERO3 = {"kind": "torch"}, {"kind": "deepspeed", "zero_stage": 3}
JOINT = {"kind": "joint", "num_steps": 10}
CASES: dict[str, dict[str, Any]] = {
    "contrastive": {"run": {"stages": [JOINT | {"kind": "contrastive"}]}},
    "findings": {"run": {"stages": [JOINT | {"kind": "findings"}]}},
    "joint, recomputed": {"model": {"activation_checkpointing": True}, "engine": {"accumulation_steps": 2}},
    "adapters, frozen encoder": {"language": {"lora_rank": 4}, "run": {"stages": [JOINT | {"kind": "generation", "freeze_encoder": True}]}},
    "pretrained": {"language": {"name_or_path": "gpt2"}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("set"))


def _tree(data: Path, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    tree = tiny_tree(data, folder / "runs")
    tree["model"]["text"]["dropout"] = 0.0
    # Large enough that not every weight is small, and odd, so that shares are padded.
    tree["model"]["language"] |= {"dropout": 0.0, "width": 66, "depth": 2} | case.get("language", {})
    tree["model"] |= case.get("model", {})
    tree["optim"] |= {"lm_lr_scale": 0.25, "clip_norm": 1.0}
    tree["engine"] |= {"micro_batch_size": ROWS} | case.get("engine", {})
    tree["run"] |= {"stages": [JOINT]} | case.get("run", {})
    return tree


def _batches(config: Config, tokenizers: Tokenizers, world_rank: int) -> list[Batch]:
    """Micro batches of this rank; the second rank's second has no sentence."""
    storage = open_storage(config.data.url)
    samples = [read_sample(storage, entry) for entry in ShardIndex.load(storage).samples("train")]
    collator = Collator(config.data, config.model.vision, tokenizers, 0, True)
    own = samples[world_rank * 10 : world_rank * 10 + 10]
    batches = [collator(own[start : start + ROWS], 0) for start in range(0, 10, ROWS)]
    names = [field.name for field in dataclasses.fields(Batch) if field.name.startswith("sentence_")]
    if world_rank == 1:
        batches[1] = dataclasses.replace(batches[1], **{name: getattr(batches[1], name)[:0] for name in names})
    return batches


def _engine(tree: dict[str, Any], engine: dict[str, Any], tokenizers: Tokenizers) -> tuple[SSACL, Engine]:
    config = parse_config(tree | {"engine": tree["engine"] | engine})
    torch.manual_seed(0)
    with construction(config.engine):
        model = SSACL.from_config(config, tokenizers)
    return model, make_engine(model, config, plan_stages(config, 5)[0])


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert {name: tensor.shape for name, tensor in one.items()} == {name: tensor.shape for name, tensor in other.items()}
    difference = sum(float((tensor - other[name]).square().sum()) for name, tensor in one.items())
    return math.sqrt(difference / sum(float(tensor.square().sum()) for tensor in one.values()))


def _same_as_plain(world_rank: int, world_size: int, tree: dict[str, Any], folder: str) -> None:
    config = parse_config(tree)
    tokenizers = Tokenizers.load(Path(config.data.url))
    batches = _batches(config, tokenizers, world_rank)
    per_step = config.engine.accumulation_steps
    _, plain = _engine(tree, PLAIN, tokenizers)
    model, deep = _engine(tree, ZERO3, tokenizers)
    assert plain.num_trained == deep.num_trained
    if world_rank == 0:
        assert _distance(plain.full_state(), deep.full_state()) == 0, "the same numbers from construction on"
    else:
        plain.full_state(), deep.full_state()
    for step in range(2):
        given = batches[step * per_step : (step + 1) * per_step]
        assert deep.evaluate(given[0], 1.0) == pytest.approx(plain.evaluate(given[0], 1.0), rel=1e-5, abs=1e-6)
        assert deep.step(given, 1.0) == pytest.approx(plain.step(given, 1.0), rel=1e-5, abs=1e-6)
    language = [parameter for name, parameter in model.language.named_parameters() if "lora_" not in name]
    assert any(is_divided(parameter) for parameter in language)
    assert not any(is_divided(parameter) for name, parameter in model.named_parameters() if not name.startswith("language."))
    whole, shares = deep.full_state(), deep.rank_state()
    assert bool(whole) == (world_rank == 0)
    if world_rank == 0:
        # AdamW turns the noise in gradients that are zero by symmetry (key biases) into full steps.
        assert _distance(plain.full_state(), whole) < 1e-3
    # On: saved, loaded into another engine, and carried over into another model.
    place = Path(folder)
    place.mkdir(exist_ok=True)
    deep.save(place).write()
    torch.distributed.barrier()
    expected = deep.step(batches[-per_step:], 1.0)
    deep.close()
    _, again = _engine(tree, ZERO3, tokenizers)
    again.load(place)
    assert again.step(batches[-per_step:], 1.0) == expected
    again.close()
    _, other = _engine(tree, {"kind": "deepspeed", "zero_stage": 2}, tokenizers)
    with pytest.raises(CheckpointError, match=r"engine\.zero_stage=3.*Set it back"):
        other.load(place)
    other.close()
    _carried_over(tree, tokenizers, shares, whole, Path(folder) / "weights.safetensors")


def _carried_over(
    tree: dict[str, Any], tokenizers: Tokenizers, shares: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], path: Path
) -> None:
    config = parse_config(tree | {"engine": tree["engine"] | ZERO3})
    with construction(config.engine):
        first, second = (SSACL.from_config(config, tokenizers) for _ in range(2))
    base = [parameter for name, parameter in first.language.named_parameters() if "lora_" not in name]
    assert all(is_divided(parameter) and parameter.numel() == 0 for parameter in base)
    assert sum(full_size(parameter) for parameter in base) > 100_000
    state = whole_state(fill_shares(first, shares))
    assert state.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in state.items())
    if torch.distributed.get_rank() == 0:
        export_weights(path, first, state)
    torch.distributed.barrier()
    load_weights(path, second)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in whole_state(second).items())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_plain_engines_numbers(data, tmp_path, case):
    tree = _tree(data, tmp_path, CASES[case])
    if case == "pretrained":
        tree["model"]["language"]["name_or_path"] = str(tmp_path / "gpt2")
        torch.manual_seed(3)
        tokenizer = Tokenizers.load(data).lm
        settings = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=66, n_layer=2, n_head=2)
        settings.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
        GPT2LMHeadModel(settings).save_pretrained(tmp_path / "gpt2")
    run_ranks(_same_as_plain, 2, tmp_path / "ranks", tree, str(tmp_path / "state"))


def _train(world_rank: int, world_size: int, trees: list[dict[str, Any]]) -> None:
    for tree in trees:
        train(parse_config(tree), LogReporter(), world_rank, world_size)


def test_a_run_of_three_stages_exports_the_whole_model(data, tmp_path):
    stages = [{"kind": kind, "num_steps": 3} for kind in ("contrastive", "findings", "generation")]
    case = {"run": {"stages": stages, "checkpoint_every_steps": 2, "validate_every_steps": 2}}
    trees = []
    for name, engine in (("plain", PLAIN), ("zero3", ZERO3)):
        tree = _tree(data, tmp_path / name, case)
        trees.append(tree | {"engine": tree["engine"] | engine})
    run_ranks(_train, 2, tmp_path / "ranks", trees)
    plain, divided = (load_model_folder(Path(tree["run"]["storage_url"]) / "tiny" / "model") for tree in trees)
    assert divided.thresholds.keys() == plain.thresholds.keys()
    assert _distance(plain.model.state_dict(), divided.model.state_dict()) < 1e-3
