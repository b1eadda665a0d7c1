"""Runs that start from a model folder: strict weights, the folder's tokenizers, and what travels along to the export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_released import Released
from training_set import tiny_config, write_training_set

from ssacl.config import Config, load_config
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers, train_tokenizers
from ssacl.errors import CheckpointError, ConfigError
from ssacl.models.official import read_released_file
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import load_model_folder, save_model_folder
from ssacl.training.loop import train
from ssacl.training.released import export_checkpoint
from ssacl.training.reporter import LogReporter
from ssacl.training.start import Start, run_tokenizers, start_encoder_from, start_from

CONTRASTIVE = [{"kind": "contrastive", "num_steps": 1}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_set(tmp_path_factory.mktemp("set"))


def _model(config: Config, data: Path, seed: int) -> SSACL:
    torch.manual_seed(seed)
    return SSACL.from_config(config, Tokenizers.load(open_storage(str(data))))


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    config = tiny_config(data, tmp_path)
    save_model_folder(tmp_path / "source", _model(config, data, 5), config, Tokenizers.load(open_storage(str(data))), {}, {})
    return tmp_path / "source"


def test_a_run_starts_from_the_folders_weights(data: Path, tmp_path: Path, folder: Path) -> None:
    source = load_model_folder(folder).model.state_dict()
    model = _model(tiny_config(data, tmp_path), data, 6)
    assert start_from(model, str(folder)) == Start()
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
    # A step at a rate of nothing: what comes out is what went in.
    config = tiny_config(data, tmp_path, optim={"lr": 1e-12, "weight_decay": 0.0}, run={"stages": CONTRASTIVE, "init_from": str(folder)})
    trained = load_model_folder(train(config, LogReporter()).model_url).model.state_dict()
    assert all(torch.allclose(value, source[name], atol=1e-6) for name, value in trained.items())


def test_stages_and_thresholds_of_the_start_go_on_with_its_weights(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path)
    tokenizers, past = Tokenizers.load(open_storage(str(data))), {"stages": ["contrastive", "findings"]}
    save_model_folder(tmp_path / "source", _model(config, data, 5), config, tokenizers, {"Edema": 0.3}, {}, past)
    run = {"stages": [{"kind": "text", "num_steps": 1}], "init_from": str(tmp_path / "source")}
    made = load_model_folder(train(tiny_config(data, tmp_path, run=run), LogReporter()).model_url)
    assert made.manifest["provenance"]["stages"] == ["contrastive", "findings", "text"]
    assert made.thresholds == {"Edema": 0.3}


def test_parts_that_the_source_lacks_start_fresh_and_others_may_not(data: Path, tmp_path: Path, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(("region.", "findings_head.", "leaf_findings."))}
    save_file(kept, folder / "model.safetensors", metadata={"tied": "{}"})
    model = _model(tiny_config(data, tmp_path), data, 6)
    fresh = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("region.")}
    assert start_from(model, str(folder)).thresholds == {}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in fresh.items())
    assert torch.equal(model.state_dict()["cls" if "cls" in weights else "encoder.cls_token"], weights["encoder.cls_token"])


BAD = {
    "missing": (lambda weights: weights.pop("encoder.cls_token"), r"1 tensors missing: encoder\.cls_token"),
    "unknown": (lambda weights: weights.update(other=torch.ones(2)), "1 tensors unknown: other"),
    "another patch grid": (
        lambda weights: weights.update({"visibility.weight": torch.ones(1, 9)}),
        r"of another shape: visibility\.weight \(1, 9\) instead of",
    ),
    "not a number": (lambda weights: weights["img_mlp.weight"].fill_(torch.nan), r"not finite \(first: img_mlp\.weight\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(data: Path, tmp_path: Path, folder: Path, case: str) -> None:
    spoil, message = BAD[case]
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"tied": "{}"})
    with pytest.raises(CheckpointError, match=message):
        start_from(_model(tiny_config(data, tmp_path), data, 6), str(folder))


def test_an_encoder_of_masked_image_pretraining_is_taken_and_nothing_else(data: Path, tmp_path: Path) -> None:
    model, source = (_model(tiny_config(data, tmp_path), data, seed) for seed in (6, 7))
    names = {"encoder.patch_embed.": "patch_embed.proj.", "encoder.": ""}
    mae = {}
    for name, value in source.state_dict().items():
        ours = next((prefix for prefix in names if name.startswith(prefix)), None)
        if ours is not None:
            mae[names[ours] + name.removeprefix(ours)] = value
    others = {"decoder_embed.weight": torch.ones(5, 5), "mask_token": torch.ones(1, 1, 5), "head.weight": torch.ones(3, 3)}
    torch.save({"model": {**mae, **others}}, tmp_path / "mae.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_encoder_from(model, str(tmp_path / "mae.pth"))
    for name, value in model.state_dict().items():
        expected = source.state_dict()[name] if name.startswith("encoder.") else before[name]
        assert torch.equal(value, expected), name
    torch.save({name: value for name, value in mae.items() if name != "cls_token"}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match="1 tensors missing: cls_token"):
        start_encoder_from(model, str(tmp_path / "mae.pth"))
    torch.save({**mae, "norm.weight": torch.full_like(mae["norm.weight"], torch.inf)}, tmp_path / "mae.pth")
    with pytest.raises(CheckpointError, match=r"not finite \(first: encoder\.norm\.weight\)"):
        start_encoder_from(model, str(tmp_path / "mae.pth"))


def test_tokenizers_are_the_folders_and_others_are_refused(data: Path, tmp_path: Path, folder: Path) -> None:
    storage = open_storage(str(data))
    config = tiny_config(data, tmp_path, run={"stages": CONTRASTIVE, "init_from": str(folder)})
    assert run_tokenizers(config, storage).fingerprint == load_model_folder(folder).tokenizers.fingerprint
    train_tokenizers(["Other words altogether, and more of them."] * 3, 100, 310).save(tmp_path / "other")
    other = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer_url": str(tmp_path / "other")})})
    with pytest.raises(ConfigError, match=r"data\.tokenizer_url holds other tokenizers"):
        run_tokenizers(other, storage)


def test_an_imported_release_trains_on_and_is_exported_whole(data: Path, tmp_path: Path) -> None:
    released = Released(tmp_path)
    folder = released.bring()
    overrides = [
        *(f"data.url={data}", "data.text_max_tokens=16", "engine.kind=torch", "engine.precision=fp32"),
        *("engine.micro_batch_size=4", "run.stages=[{kind: joint, num_steps: 1}]", f"run.storage_url={tmp_path / 'runs'}"),
        f"run.init_from={folder}",
    ]
    outcome = train(load_config(folder / "config.yaml", overrides), LogReporter())
    export_checkpoint(Path(outcome.model_url), tmp_path / "trained.pth")
    state, _ = read_released_file(tmp_path / "trained.pth")
    assert state.keys() == released.state.keys() - {"WCE.weight"}
    moved = [name for name, value in state.items() if not torch.equal(value, released.state[name])]
    assert "patch_embed.proj.weight" in moved
    assert any(name.startswith("opt_model.") for name in moved)


def test_without_the_language_tokenizer_no_text_can_be_trained(data: Path, tmp_path: Path) -> None:
    folder = Released(tmp_path).bring(language_model=None)
    config = tiny_config(data, tmp_path, run={"stages": CONTRASTIVE, "init_from": str(folder)})
    with pytest.raises(ConfigError, match="--language-model DIR"):
        run_tokenizers(config, open_storage(str(data)))
