"""A model that is made ready to write: the same numbers in fp32, near ones in bf16 and int8, and a complete draft in each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_model import encoded_film, tiny_model_folder
from torch import nn
from transformers.pytorch_utils import Conv1D

from ssacl.data.dicom import read_picture
from ssacl.inference.generator import GenerationOptions, ReportGenerator
from ssacl.inference.precision import Int8Linear, PackedLinear, Precision
from ssacl.training.checkpoint import open_model

OPTIONS = GenerationOptions(num_beams=3, max_new_tokens=16)
PICTURES = [read_picture(encoded_film("PNG", seed=seed), "film") for seed in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "model")


def test_packed_weights_write_what_plain_ones_write(folder: Path) -> None:
    packed, plain = ReportGenerator.load(folder), ReportGenerator(open_model(folder))
    kinds = {type(module) for module in packed._model.language.model.modules()}
    assert PackedLinear in kinds
    assert not kinds & {nn.Linear, Conv1D}
    for ours, theirs in zip(packed.generate(PICTURES, OPTIONS), plain.generate(PICTURES, OPTIONS), strict=True):
        assert ours.text == theirs.text
        assert [item.probability for item in ours.findings] == pytest.approx([item.probability for item in theirs.findings], abs=1e-5)
        assert [item.confidence for item in ours.sentences] == pytest.approx([item.confidence for item in theirs.sentences], rel=1e-3)


# Random weights magnify every error; two unrelated drafts are .3 apart.
@pytest.mark.parametrize(("precision", "limit"), [("bf16", 0.05), ("int8", 0.15)])
def test_fewer_bits_stay_near(folder: Path, precision: Precision, limit: float) -> None:
    exact = ReportGenerator.load(folder).generate(PICTURES, OPTIONS)
    drafts = ReportGenerator.load(folder, precision=precision).generate(PICTURES, OPTIONS)
    differences = []
    for draft, other in zip(drafts, exact, strict=True):
        json.dumps(draft.to_json(), allow_nan=False)
        assert draft.provenance["precision"] == precision
        differences += [abs(own.probability - item.probability) for own, item in zip(draft.findings, other.findings, strict=True)]
    assert 0 < sum(differences) / len(differences) < limit


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_agree_with_the_plain_one(bias: bool) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(64, 40, bias), torch.randn(2, 3, 64)
    with torch.no_grad():
        expected = plain(x)
        own_bias = None if plain.bias is None else plain.bias.detach()
        torch.testing.assert_close(PackedLinear(plain.weight.detach(), own_bias)(x), expected, rtol=1e-4, atol=1e-5)
        error = Int8Linear(plain.weight.detach(), own_bias)(x) - expected
    assert 0 < float(error.abs().max()) < 0.05 * float(expected.abs().max())
