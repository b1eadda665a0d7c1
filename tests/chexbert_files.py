"""A CheXbert on disk: small random weights in the published layout and names."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

WIDTH = 64
WORDS = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "pleural", "effusion", "pneumo", "##thorax", ".", ",", "heart"]
WORDS += ["is", "normal", "large", "small", "left", "right", "lung", "##s", "clear"]
WORDS += list("abcdefghijklmnopqrstuvwxyz")


def published(width: int = WIDTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names and shapes of the published checkpoint, smaller than BERT-base."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=width, num_hidden_layers=2, num_attention_heads=width // 64, intermediate_size=2 * width
    )
    bert = BertModel(config)
    # Larger than at the start of a training: [CLS] must see the words, or every text has the same classes.
    state = {f"module.bert.{name}": value * (8 if value.ndim == 2 else 1) for name, value in bert.state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    for index in range(14):
        state[f"module.linear_heads.{index}.weight"] = torch.randn(2 if index == 13 else 4, width)
        state[f"module.linear_heads.{index}.bias"] = torch.randn(2 if index == 13 else 4)
    return state


def write_chexbert(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.save({"epoch": 8, "model_state_dict": state, "optimizer_state_dict": {}}, folder / "chexbert.pth")
    return folder
