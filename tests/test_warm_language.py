"""A language decoder taught on texts alone: it learns, goes on where it stopped, and fits `model.language.name_or_path`."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from ssacl.cli import main
from ssacl.config import LanguageConfig
from ssacl.data.tokenization import Tokenizers
from ssacl.errors import ConfigError, DataError
from ssacl.models.language import LanguageDecoder
from ssacl.phantom import generate_study
from ssacl.training.sealed import read_manifest
from ssacl.training.warm_language import TOKENIZERS, WarmOptions, read_report_texts, warm_language

SMALL = LanguageConfig(width=32, depth=1, num_heads=2, max_positions=128, dropout=0.0)
OPTIONS = WarmOptions(num_epochs=4, lr=2e-2, batch_size=16, max_tokens=64, num_samples=2, vocab_size=400, language=SMALL)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    for index in range(120):
        (folder / f"{index}.txt").write_text(generate_study(5, index, size_px=64).report, encoding="utf-8")
    return read_report_texts(folder)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_it_learns_and_an_interrupted_run_ends_with_the_same_weights(texts: list[str], tmp_path: Path) -> None:
    outcome = warm_language(texts, tmp_path / "whole", OPTIONS)
    assert outcome.num_train + outcome.num_validation == len(texts)
    assert outcome.perplexity_before == pytest.approx(400, rel=0.3), "a model that knows nothing guesses among all tokens"
    assert outcome.perplexity_after < outcome.perplexity_before / 4
    assert outcome.samples_after != outcome.samples_before

    steps, done = [], []

    def stop_after_an_epoch(count: int, note: str) -> None:
        steps.append(count)
        if len(steps) == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_language(texts, tmp_path / "stopped", OPTIONS, progress=stop_after_an_epoch)
    assert not (tmp_path / "stopped").exists(), "a folder that is not done is not visible"
    again = warm_language(texts, tmp_path / "stopped", OPTIONS, start=lambda total, before: done.append((total, before)))
    assert 0 < done[0][1] < done[0][0], "it went on after the last whole epoch"
    assert again.perplexity_after == pytest.approx(outcome.perplexity_after, rel=1e-5)
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "stopped")
    assert all(torch.allclose(value, resumed[name], atol=1e-6) for name, value in whole.items())
    assert not list(tmp_path.glob(".*")), "nothing is left beside the folders"


def test_the_folder_is_a_language_model_of_a_run(texts: list[str], tmp_path: Path) -> None:
    warm_language(texts, tmp_path / "lm", OPTIONS)
    tokenizers = Tokenizers.load(tmp_path / "lm" / TOKENIZERS)
    decoder = LanguageDecoder(SMALL.model_copy(update={"name_or_path": str(tmp_path / "lm")}), tokenizers.lm)
    saved = _weights(tmp_path / "lm")
    assert np.array_equal(decoder.model.transformer.wte.weight.detach().numpy(), saved["transformer.wte.weight"].numpy())
    assert read_manifest(tmp_path / "lm")["figures"]["num_train"] > 0


def test_command_and_its_wrong_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "reports.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["findings", "text"])
        writer.writerows([f"The heart is normal, film {number}.", "No effusion."] for number in range(40))
    command = ["warm-language", "--texts", str(table), "--out", str(tmp_path / "lm"), "--epochs", "1", "--vocab-size", "300"]
    sizes = ["width=16", "depth=1", "num_heads=2", "max_positions=300"]
    assert main([*command, *sizes]) == 1
    assert "no column impression" in capsys.readouterr().err
    assert main([*command, "--impression", "text", *sizes]) == 0
    assert "perplexity per token" in capsys.readouterr().out
    assert main([*command, "--impression", "text", *sizes, "max_positions=30"]) == 1
    assert "max_positions" in capsys.readouterr().err
    assert main([*command, "--impression", "text", *sizes, "num_heads=3"]) == 1
    assert "width 16 is not divisible by 3 heads" in capsys.readouterr().err


def test_texts_that_cannot_be_read_or_split(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no report text"):
        read_report_texts(tmp_path / "empty")
    (tmp_path / "bytes.csv").write_bytes(b"findings,impression\n\xff\xfe,x\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_report_texts(tmp_path / "bytes.csv")
    with pytest.raises(DataError, match="distinct texts"):
        warm_language(["The heart is normal."], tmp_path / "lm", OPTIONS)
    with pytest.raises(ConfigError, match="validation_share"):
        WarmOptions(validation_share=1.0)
