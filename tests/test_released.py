"""Released checkpoint files to model folders and back: every bit kept, every odd file refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_model import small_config, small_tokenizers
from tiny_model import encoded_film
from torch import Tensor

from ssacl.cli import main
from ssacl.data.dicom import read_picture
from ssacl.data.tokenization import AbsentLanguageTokenizer, Tokenizers, train_tokenizers
from ssacl.errors import CheckpointError, DataError, GenerationError, StorageError
from ssacl.inference.generator import GenerationOptions, ReportGenerator
from ssacl.models.official import EXTRAS, OWN_PARTS, export_released, read_released, read_released_file
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import load_model_folder, save_model_folder
from ssacl.training.released import export_checkpoint, import_checkpoint

PARITY = Path(__file__).parents[2] / "shared" / "parity"
HEADS = {
    "vision": {"num_heads": 2, "decoder_num_heads": 2},
    "text": {"num_heads": 2},
    "language": {"num_heads": 2},
}
TEXTS = ["The lungs are clear. No pleural effusion.", "Small left pleural effusion. The heart is enlarged."] * 3


class Released:
    """A small random checkpoint of the released layout, its tokenizers and its configuration, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lm = train_tokenizers(TEXTS, 200, 300).lm
        self.lm_vocab = len(lm)
        text = small_tokenizers().text
        config = small_config(
            model__wiring="official",
            model__vision__decoder_width=24,
            model__text__vocab_size=text.get_vocab_size() + 3,
            model__language__vocab_size=self.lm_vocab,
            losses__grounding={"enabled": False},
        )
        torch.manual_seed(1)
        model = SSACL.from_config(config, Tokenizers(text, lm))
        extras = {f"{prefix}predictions.bias" if prefix.endswith(".") else prefix: torch.randn(3) for prefix in EXTRAS}
        self.state = export_released(model, extras) | {"WCE.weight": torch.ones(4)}
        self.path, self.tokenizer, self.heads = folder / "released.pth", folder / "words.json", folder / "heads.yaml"
        self.write()
        text.save(str(self.tokenizer))
        self.heads.write_text(yaml.safe_dump({"model": HEADS}))
        self.language = folder / "gpt2"
        lm.save_pretrained(self.language)
        self.settings = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96, "vocab_size": self.lm_vocab}
        self.write_settings()

    def write(self, **changes: Tensor) -> None:
        torch.save({"model": {**self.state, **changes}, "epoch": 17}, self.path)

    def write_settings(self, **changes: Any) -> None:
        (self.language / "config.json").write_text(json.dumps({**self.settings, **changes}))

    def bring(self, **changes: Any) -> Path:
        arguments = {"tokenizer": self.tokenizer, "language_model": self.language, "config_path": self.heads, **changes}
        import_checkpoint(self.path, out=self.folder / "model", **arguments)
        return self.folder / "model"


@pytest.fixture
def released(tmp_path: Path) -> Released:
    return Released(tmp_path)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def test_import_export_import_is_bit_exact_through_the_command(released: Released) -> None:
    folder, back, again = released.folder / "model", released.folder / "back.pth", released.folder / "again"
    arguments = ["--tokenizer", str(released.tokenizer), "--config", str(released.heads), "--language-model", str(released.language)]
    assert main(["checkpoint", "import", str(released.path), *arguments, "--out", str(folder)]) == 0
    assert main(["checkpoint", "export", str(folder), "--out", str(back)]) == 0
    state, epoch = read_released_file(back)
    assert epoch == 17
    assert_same(state, {name: value for name, value in released.state.items() if name != "WCE.weight"})
    assert main(["checkpoint", "import", str(back), *arguments, "--out", str(again)]) == 0
    assert_same(load_model_folder(again).model.state_dict(), load_model_folder(folder).model.state_dict())
    assert sorted(path.name for path in released.folder.glob(".*")) == []


@pytest.mark.skipif(not (PARITY / "dev").is_dir(), reason="the reference vectors are not beside the repository")
def test_the_reference_checkpoint_comes_and_goes_bit_exact(tmp_path: Path) -> None:
    sizes = json.loads((PARITY / "dev" / "expected.json").read_text())["config"]
    heads = {
        "vision": {"num_heads": sizes["vit"]["num_heads"], "decoder_num_heads": sizes["vit"]["decoder_num_heads"]},
        "language": {"num_heads": sizes["gpt2"]["n_head"]},
    }
    (tmp_path / "heads.yaml").write_text(yaml.safe_dump({"model": heads}))
    path, words = PARITY / "dev" / "official_layout.pth", PARITY / "small_wordpiece.json"
    import_checkpoint(path, words, tmp_path / "model", config_path=tmp_path / "heads.yaml")
    export_checkpoint(tmp_path / "model", tmp_path / "back.pth")
    original = read_released(path)
    assert_same(read_released(tmp_path / "back.pth"), {name: value for name, value in original.items() if name != "WCE.weight"})
    import_checkpoint(tmp_path / "back.pth", words, tmp_path / "again", config_path=tmp_path / "heads.yaml")
    first, second = load_model_folder(tmp_path / "model"), load_model_folder(tmp_path / "again")
    assert first.model_version == second.model_version
    assert (first.config.model.vision.num_heads, first.config.model.text.num_heads, first.config.model.language.num_heads) == (4, 6, 4)


def test_the_manifest_names_what_was_kept_dropped_and_new(released: Released) -> None:
    loaded = load_model_folder(released.bring())
    record = loaded.manifest["provenance"]["released"]
    assert record["dropped"] == {"WCE.weight": "class weights of the last training batch"}
    assert record["extras"] == ["bert_encoder.model.cls.predictions.bias", "logit_scale"]
    assert record["fresh"]
    assert all(name.startswith(OWN_PARTS) for name in record["fresh"])
    assert (loaded.manifest["language_tokenizer"], loaded.config.model.wiring) == (True, "official")
    assert "extras.safetensors" in loaded.manifest["files"]
    assert loaded.config.data.text_max_tokens <= loaded.config.model.text.max_tokens


def test_without_the_language_tokenizer_text_fails_by_name_and_the_rest_works(released: Released) -> None:
    folder = released.bring(language_model=None)
    generator = ReportGenerator.load(folder)
    with pytest.raises(GenerationError, match="--language-model"):
        generator.generate([read_picture(encoded_film("PNG"), "film")], GenerationOptions(num_beams=1))
    loaded = load_model_folder(folder)
    assert isinstance(loaded.tokenizers.lm, AbsentLanguageTokenizer)
    for ask in (lambda: loaded.tokenizers.lm_ids("No Finding"), lambda: loaded.tokenizers.newline_id, lambda: loaded.tokenizers.lm_pad_id):
        with pytest.raises(GenerationError, match="--language-model"):
            ask()
    with torch.inference_mode():
        encoded = loaded.model.encode(torch.zeros(1, 3, 32, 32))
    assert bool(encoded.attention_BGN.isfinite().all())
    # A data set's tokenizers are never allowed to be half there.
    with pytest.raises(DataError, match="language_model"):
        Tokenizers.load(folder)
    export_checkpoint(folder, released.folder / "back.pth")
    assert_same(read_released(released.folder / "back.pth"), {k: v for k, v in released.state.items() if k != "WCE.weight"})


def test_a_report_needs_a_trained_findings_head(released: Released) -> None:
    with pytest.raises(GenerationError, match="findings"):
        ReportGenerator.load(released.bring()).generate([read_picture(encoded_film("PNG"), "film")])


def _state_with(**changes: Tensor) -> Callable[[Released], None]:
    return lambda released: released.write(**{name.replace("__", "."): value for name, value in changes.items()})


def _without(name: str) -> Callable[[Released], None]:
    def spoil(released: Released) -> None:
        del released.state[name]
        released.write()

    return spoil


def _config(tree: dict[str, Any]) -> Callable[[Released], None]:
    return lambda released: released.heads.write_text(yaml.safe_dump({"model": tree}))


def _words(released: Released) -> None:
    train_tokenizers([f"{a}{b} words enough" for a in "abcdefghij" for b in "klmnopqrst"], 900, 300).text.save(str(released.tokenizer))


def _untied(released: Released) -> None:
    released.write(**{"opt_model.lm_head.weight": released.state["opt_model.lm_head.weight"] + 1})


def _language(released: Released) -> None:
    train_tokenizers([f"{a}{b}{c} syllables" for a in "abcdefgh" for b in "aeiou" for c in "klmnopqr"], 300, 900).lm.save_pretrained(
        released.language
    )


REFUSALS: dict[str, tuple[Callable[[Released], Any], str]] = {
    "a tensor missing": (_without("blocks.1.mlp.fc1.weight"), r"missing: encoder\.blocks\.1\.mlp\.fc1\.weight"),
    "a size missing": (_without("patch_embed.proj.weight"), r"patch_embed\.proj\.weight.*missing"),
    "a tensor too many": (_state_with(blocks__1__mlp__fc9__weight=torch.zeros(1)), r"unknown: blocks\.1\.mlp\.fc9"),
    "another patch grid": (_state_with(pos_embed=torch.zeros(1, 26, 24)), r"of another shape: .*decoder\.pos_embed"),
    "no square grid": (_state_with(pos_embed=torch.zeros(1, 19, 24)), "18 patches make no square grid"),
    "a flat tensor": (_state_with(pos_embed=torch.tensor(1.0)), "sizes do not fit"),
    "a NaN": (_state_with(mask_token=torch.full((1, 1, 24), float("nan"))), r"not finite: decoder\.mask_token"),
    "a NaN beside the model": (_state_with(logit_scale=torch.tensor(float("nan"))), "not finite: logit_scale"),
    "half precision": (_state_with(mask_token=torch.zeros(1, 1, 24).half()), "float16 instead of float32"),
    "an untied head": (_untied, "not a GPT-2 release"),
    "wrong heads": (_config({**HEADS, "text": {"num_heads": 3}}), r"3 heads"),
    "a configuration of another grid": (_config({**HEADS, "vision": {"image_size_px": 64, "num_heads": 2}}), "image_size_px is 64.*32"),
    "another wiring": (_config({**HEADS, "wiring": "paper"}), "model.wiring is 'paper'"),
    "text tokenizer too large": (_words, "text tokenizer has .* tokens"),
    "language tokenizer too large": (_language, "language tokenizer has .* tokens"),
    "text tokenizer damaged": (lambda released: released.tokenizer.write_text("{"), "cannot be read as a tokenizer"),
    "text tokenizer absent": (lambda released: released.tokenizer.unlink(), "cannot be read as a tokenizer"),
    "another language model": (lambda released: released.write_settings(n_layer=12), "n_layer 12 instead of 1"),
    "no GPT-2": (lambda released: released.write_settings(model_type="opt"), "not describe a GPT-2"),
    "another activation": (lambda released: released.write_settings(activation_function="relu"), "relu"),
    "no config.json": (lambda released: (released.language / "config.json").unlink(), r"config\.json"),
    "no language tokenizer": (lambda released: (released.language / "tokenizer.json").write_text("[]"), "No tokenizer can be read"),
    "not a checkpoint": (lambda released: released.path.write_bytes(b"not a checkpoint"), "damaged|objects"),
    "cut short": (lambda released: released.path.write_bytes(released.path.read_bytes()[:5000]), "damaged|objects"),
    "empty": (lambda released: released.path.write_bytes(b""), "damaged|objects"),
    "absent": (lambda released: released.path.unlink(), "Cannot read"),
    "code inside": (lambda released: torch.save({"model": released.state, "args": Path("x")}, released.path), "never unpickled"),
    "another file of torch": (lambda released: torch.save([1, 2], released.path), "no state_dict"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_imported_is_refused_by_name(released: Released, case: str) -> None:
    spoil, message = REFUSALS[case]
    spoil(released)
    with pytest.raises(CheckpointError, match=message):
        released.bring()
    assert not (released.folder / "model").exists()


def test_the_command_says_it_in_one_line(released: Released, capsys: pytest.CaptureFixture[str]) -> None:
    released.path.write_bytes(b"not a checkpoint")
    code = main(["checkpoint", "import", str(released.path), "--tokenizer", str(released.tokenizer), "--out", str(released.folder / "m")])
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 1
    assert error[-1].startswith("ssacl: ")
    assert not any(line.startswith("Traceback") for line in error)


def test_only_an_imported_official_model_can_be_exported(released: Released, tmp_path: Path) -> None:
    loaded = load_model_folder(released.bring())
    config = loaded.config.model_copy(update={"model": loaded.config.model.model_copy(update={"wiring": "paper"})})
    model = SSACL.from_config(config, loaded.tokenizers)
    save_model_folder(tmp_path / "paper", model, config, loaded.tokenizers, {}, {})
    with pytest.raises(CheckpointError, match="official"):
        export_checkpoint(tmp_path / "paper", tmp_path / "x.pth")
    save_model_folder(tmp_path / "bare", loaded.model, loaded.config, loaded.tokenizers, {}, {})
    with pytest.raises(CheckpointError, match="extras"):
        export_checkpoint(tmp_path / "bare", tmp_path / "x.pth")
    assert not list(tmp_path.glob("*x.pth*"))


def test_an_export_that_cannot_be_written_leaves_nothing(released: Released) -> None:
    folder = released.bring()
    place = released.folder / "there"
    place.mkdir()
    (place / "file").write_text("x")
    with pytest.raises(StorageError, match="Cannot write"):
        export_checkpoint(folder, place / "file" / "x.pth")
    with pytest.raises(StorageError, match="Cannot write"):
        export_checkpoint(folder, place)
    assert sorted(path.name for path in released.folder.glob("**/.*")) == []
