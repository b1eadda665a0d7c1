"""The `official` wiring against the reference vectors of the release, and its checkpoint layout."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.parity import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    TENSOR_TOLERANCE,
    Vectors,
    Vocabulary,
    build_model,
    compare,
    gradient_errors,
)
from ssacl.config import GroundingConfig, LossConfig
from ssacl.errors import CheckpointError
from ssacl.models.official import EXTRAS, OWN_PARTS, export_released, import_released, infer_config, our_name, read_released
from ssacl.models.ssacl import SSACL

PARITY = Path(__file__).parents[2] / "shared" / "parity"
pytestmark = pytest.mark.skipif(not (PARITY / "dev").is_dir(), reason="the reference vectors are not beside the repository")


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return Vectors.load(PARITY / "dev")


def test_losses_tensors_and_gradient_norms_equal_the_release() -> None:
    figures = compare(PARITY / "dev")
    assert (LOSS_TOLERANCE, TENSOR_TOLERANCE, GRADIENT_TOLERANCE) == (1e-5, 1e-4, (1e-3, 1e-6))
    assert len(figures["loss_relative_error"]) == 6
    assert len(figures["tensor_max_absolute_error"]) == 10
    assert len(figures["gradient_error_in_tolerances"]) == 129
    assert figures["worst_loss"] <= LOSS_TOLERANCE
    assert figures["worst_tensor"] <= TENSOR_TOLERANCE
    assert figures["worst_gradient"] <= 1.0


def test_a_missing_and_an_unwanted_gradient_are_failures(vectors: Vectors) -> None:
    model = build_model(vectors)
    model.tau.grad = torch.tensor(1.0)
    errors = gradient_errors(model, {"Tpar": -1.0, "cls_token": 0.5, "pos_embed": -1.0})
    assert errors == {"Tpar": sys.float_info.max, "cls_token": sys.float_info.max, "pos_embed": 0.0}


def test_import_export_import_is_bit_exact(vectors: Vectors) -> None:
    model = build_model(vectors)
    imported = import_released(model, vectors.state)
    assert imported.dropped == {"WCE.weight": "class weights of the last training batch"}
    exported = export_released(model, imported.extras)
    assert exported.keys() == vectors.state.keys() - {"WCE.weight"}
    assert all(torch.equal(exported[name], vectors.state[name]) for name in exported)
    again = build_model(replace(vectors, state=exported))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items() if our_name_exists(name, vectors))


def our_name_exists(name: str, vectors: Vectors) -> bool:
    return name in {our_name(released) for released in vectors.state}


def test_every_name_and_shape_of_the_base_layout_has_a_place(vectors: Vectors) -> None:
    layout = json.loads((PARITY / "official_state_dict.json").read_text(encoding="utf-8"))
    assert len(layout) == 475
    homeless = [name for name in layout if our_name(name) is None and not name.startswith(EXTRAS)]
    assert homeless == []
    sizes = infer_config({name: torch.empty(shape, device="meta") for name, (shape, _) in layout.items()})
    assert (sizes.vision.width, sizes.vision.depth, sizes.vision.image_size_px, sizes.vision.target_scale) == (768, 12, 224, 1)
    assert (sizes.text.width, sizes.text.depth, sizes.text.vocab_size) == (384, 6, 30000)
    assert (sizes.language.width, sizes.language.depth, sizes.language.max_positions) == (768, 12, 1024)
    tokenizers = SimpleNamespace(text=vectors.tokenizer, lm=Vocabulary(50257, 0))
    with torch.device("meta"):
        model = SSACL(sizes, LossConfig(grounding=GroundingConfig(enabled=False)), tokenizers)
    ours = {name: list(value.shape) for name, value in model.state_dict().items() if not name.startswith(OWN_PARTS)}
    assert ours == {our_name(name): shape for name, (shape, _) in layout.items() if not name.startswith(EXTRAS)}


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "nan"])
def test_a_damaged_state_is_refused_by_name(vectors: Vectors, damage: str) -> None:
    model = build_model(vectors)
    state = dict(vectors.state)
    name = "blocks.1.mlp.fc1.weight"
    if damage == "missing":
        del state[name]
    elif damage == "unknown":
        state["blocks.1.mlp.fc9.weight"] = torch.zeros(1)
    elif damage == "shape":
        state[name] = state[name][:-1]
    else:
        state[name] = torch.full_like(state[name], float("nan"))
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc"):
        import_released(model, state)


def test_a_file_with_other_objects_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    torch.save({"model": {"x": torch.zeros(1)}, "args": Path("anything")}, path)
    with pytest.raises(CheckpointError, match="never unpickled"):
        read_released(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError):
        read_released(path)
    with pytest.raises(CheckpointError, match="Cannot read"):
        read_released(tmp_path / "absent.pth")
