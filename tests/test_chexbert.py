"""CheXbert from a folder: small random weights in the published layout, against transformers' own classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chexbert_files import WIDTH, WORDS, published, write_chexbert
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizer

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.data.chexbert import CLASSES, HEAD_SIZES, CheXbert, label_reports
from ssacl.errors import CheckpointError
from ssacl.scores.clinical import report_status

TEXTS = [
    "No pleural effusion.",
    "Small LEFT pneumothorax,\n  heart is normal. Lungs clear.",
    "",
    "Large right effusion",
    "___",
    "Heart is large. " * 200,
]


def reference(state: dict[str, torch.Tensor], vocabulary: Path, text: str) -> list[int]:
    """Classes of one text as the published script finds them: one text at a time, transformers' tokenizer and BERT, no padding."""
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    width = plain["linear_heads.0.weight"].shape[1]
    bert = BertModel(
        BertConfig(
            vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=2, num_attention_heads=width // 64, intermediate_size=2 * width
        )
    ).eval()
    bert.load_state_dict(
        {name.removeprefix("bert."): plain[name] for name in plain if name.startswith("bert.") and "position_ids" not in name}
    )
    tokenizer = BertTokenizer(vocab=str(vocabulary))
    ids = tokenizer(" ".join(text.split()))["input_ids"]
    if len(ids) > 512:
        ids = [*ids[:511], tokenizer.sep_token_id]
    with torch.no_grad():
        hidden = bert(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))[0][:, 0]
    return [int((hidden @ plain[f"linear_heads.{index}.weight"].T + plain[f"linear_heads.{index}.bias"]).argmax()) for index in range(14)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chexbert(tmp_path_factory.mktemp("chexbert"), published())


def test_statuses_are_those_of_the_published_computation(folder: Path) -> None:
    status = label_reports(TEXTS, folder, batch_size=4)
    assert status.shape == (len(TEXTS), len(FINDINGS))
    for index in (0, 1, 3, 5):
        expected = [int(CLASSES[value]) for value in reference(published(), folder / "vocab.txt", TEXTS[index])]
        assert status[index].tolist() == expected
    assert len({tuple(status[index]) for index in (0, 1, 3, 5)}) == 4
    # All four classes occur, so that a wrong map would show.
    assert {int(value) for value in status.ravel()} == {int(value) for value in FindingStatus}


def test_what_has_no_letter_is_unmentioned(folder: Path) -> None:
    status = label_reports(TEXTS, folder)
    assert (status[[2, 4]] == int(FindingStatus.UNMENTIONED)).all()
    assert label_reports([], folder).shape == (0, 14)


def test_batches_and_order_change_nothing(folder: Path) -> None:
    labeler = CheXbert.load(folder)
    one = labeler.status(TEXTS, batch_size=1)
    assert (labeler.status(TEXTS, batch_size=16) == one).all()
    assert (labeler.status(TEXTS[::-1]) == one[::-1]).all()
    assert (report_status(TEXTS, labeler) == one).all()


def test_safetensors_without_the_prefix(folder: Path, tmp_path: Path) -> None:
    state = {name.removeprefix("module."): value.contiguous() for name, value in published().items()}
    other = write_chexbert(tmp_path / "safe", published())
    (other / "chexbert.pth").unlink()
    save_file(state, other / "model.safetensors")
    assert (label_reports(TEXTS, other) == label_reports(TEXTS, folder)).all()
    assert CheXbert.load(other).name != CheXbert.load(folder).name


def test_other_heads_are_told_by_the_configuration(tmp_path: Path) -> None:
    folder = write_chexbert(tmp_path, published())
    default = label_reports(TEXTS, folder)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 8}))
    assert CheXbert.load(folder).bert.config.num_attention_heads == 8
    assert (label_reports(TEXTS, folder) != default).any()


def drop(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        state = published()
        del state[name]
        write_chexbert(folder, state)

    return change


def heads_of_three(folder: Path) -> None:
    state = published()
    state["module.linear_heads.0.weight"] = torch.randn(3, WIDTH)
    write_chexbert(folder, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "vocab.txt").unlink(), "no vocab.txt"),
        (lambda folder: (folder / "chexbert.pth").unlink(), "0 files of weights"),
        (lambda folder: (folder / "second.pt").write_bytes(b""), "2 files of weights"),
        (lambda folder: (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n"), "vocab.txt of bert-base-uncased"),
        (lambda folder: (folder / "chexbert.pth").write_bytes(b"not a checkpoint"), "damaged, or holds objects"),
        (lambda folder: torch.save({"model_state_dict": {}}, folder / "chexbert.pth"), "no state_dict"),
        (lambda folder: torch.save([1, 2], folder / "chexbert.pth"), "no state_dict"),
        (lambda folder: (folder / "config.json").write_text("{}"), "num_attention_heads"),
        (lambda folder: (folder / "config.json").write_text('{"num_attention_heads": 5}'), "do not divide"),
        (drop("module.linear_heads.13.weight"), "not CheXbert's"),
        (drop("module.bert.encoder.layer.1.output.dense.bias"), "does not have CheXbert's tensors"),
        (heads_of_three, "have .* classes"),
    ],
)
def test_named_errors(change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = write_chexbert(tmp_path, published())
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        CheXbert.load(folder)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    folder = write_chexbert(tmp_path, published())
    torch.save({"model_state_dict": published(), "trap": Path("x")}, folder / "chexbert.pth")
    with pytest.raises(CheckpointError, match="never unpickled"):
        CheXbert.load(folder)


def test_the_findings_stand_in_chexberts_order() -> None:
    assert len(HEAD_SIZES) == len(FINDINGS)
    # The order of its heads as published.
    assert (
        *("Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia"),
        *("Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding"),
    ) == FINDINGS
