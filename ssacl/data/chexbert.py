"""CheXbert (arXiv 2004.09167) as a labeler, where its weights are given: BERT and one linear head per finding.

The folder holds one file of weights in the published layout (`*.pth`, `*.pt` or `*.safetensors`) and BERT's own `vocab.txt`; `config.json`
(Hugging Face) only where the attention heads are not 64 wide. Nothing is downloaded, and nothing but tensors is unpickled. CheXbert was
trained on impressions; texts are cut at 512 tokens, as published.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from ssacl.anatomy import FINDINGS, FindingStatus
from ssacl.errors import CheckpointError

MAX_TOKENS = 512
HEAD_SIZES = (*(4,) * (len(FINDINGS) - 1), 2)
"""Classes per finding, in `FINDINGS` order, which is CheXbert's: blank, positive, negative, uncertain; "No Finding" has the first two."""
CLASSES = (FindingStatus.UNMENTIONED, FindingStatus.PRESENT, FindingStatus.ABSENT, FindingStatus.UNCERTAIN)
_WEIGHTS = (".pth", ".pt", ".safetensors")
_HEAD_WIDTH = 64
# A buffer that some releases of transformers stored.
_NOT_WEIGHTS = ("bert.embeddings.position_ids",)


def label_reports(texts: Sequence[str], chexbert_folder: str | Path, batch_size: int = 16) -> NDArray[np.int64]:
    """[n, 14] `FindingStatus` of report texts by the CheXbert in a folder; see `CheXbert`."""
    return CheXbert.load(chexbert_folder).status(texts, batch_size)


class CheXbert(nn.Module):
    """The labeler. `load` makes one from a folder; its state dict has the published names.

    Parameters
    ----------
    config
        `transformers.BertConfig`.
    tokenizer
        WordPiece that puts [CLS] before a text and [SEP] behind it.
    name
        What score cards call it.
    """

    def __init__(self, config: Any, tokenizer: Tokenizer, name: str = "CheXbert") -> None:
        from transformers import BertModel

        super().__init__()
        self.bert = BertModel(config)
        self.linear_heads = nn.ModuleList(nn.Linear(config.hidden_size, size) for size in HEAD_SIZES)
        self.tokenizer = tokenizer
        self.name = name

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> CheXbert:
        """Read a folder.

        Raises
        ------
        CheckpointError
            Weights or vocabulary are missing or damaged, or are not CheXbert's.
        """
        folder = Path(folder)
        weights = sorted(path for path in folder.glob("*") if path.suffix in _WEIGHTS)
        if len(weights) != 1 or not (folder / "vocab.txt").is_file():
            raise CheckpointError(
                f"{folder} holds {len(weights)} files of weights ({', '.join('*' + suffix for suffix in _WEIGHTS)}) and "
                f"{'a' if (folder / 'vocab.txt').is_file() else 'no'} vocab.txt; CheXbert needs one of each."
            )
        state = _read_state(weights[0])
        config = _config(state, folder)
        tokenizer = _tokenizer(folder / "vocab.txt", config.vocab_size)
        with weights[0].open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        model = cls(config, tokenizer, f"CheXbert {digest[:12]}")
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{weights[0].name} does not have CheXbert's tensors: {_first_lines(error)}") from error
        return model.to(device).eval()

    @torch.inference_mode()
    def status(self, texts: Sequence[str], batch_size: int = 16) -> NDArray[np.int64]:
        """[n, 14] `FindingStatus`; a text without a letter leaves all findings unmentioned. The batch size changes nothing but speed."""
        result = np.full((len(texts), len(FINDINGS)), int(FindingStatus.UNMENTIONED), dtype=np.int64)
        plain = [" ".join(text.split()) for text in texts]
        ids = {
            index: encoding.ids for index, encoding in enumerate(self.tokenizer.encode_batch(plain)) if re.search(r"[^\W\d_]", plain[index])
        }
        # Texts of like length share a batch, so that little is computed on padding.
        order = sorted(ids, key=lambda index: len(ids[index]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for finding, logits in enumerate(self([ids[index] for index in rows])):
                result[rows, finding] = np.array(CLASSES)[logits.argmax(dim=1).cpu().numpy()]
        return result

    def forward(self, ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits per finding, [B, 4] or [B, 2], of token ids with [CLS] and [SEP]."""
        from ssacl.data.tokenization import pad

        device = next(self.parameters()).device
        padded, mask = (each.to(device) for each in pad(ids, pad_id=0))
        # The heads read the last hidden state of [CLS], not BERT's pooled output.
        hidden = self.bert(padded, attention_mask=mask.long()).last_hidden_state[:, 0]
        return [head(hidden) for head in self.linear_heads]


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors under the published names, without DataParallel's prefix."""
    if path.suffix == ".safetensors":
        from ssacl.training.checkpoint import read_tensors

        tree: Any = read_tensors(path)
    else:
        from ssacl.models.official import unpickle_tensors

        tree = unpickle_tensors(path)
    state = tree.get("model_state_dict", tree) if isinstance(tree, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path.name} holds no state_dict under 'model_state_dict'; expected the published checkpoint.")
    named = {str(name).removeprefix("module."): value for name, value in state.items()}
    return {name: value for name, value in named.items() if name not in _NOT_WEIGHTS}


def _config(state: Mapping[str, Tensor], folder: Path) -> Any:
    """BERT's sizes from the tensors; the number of heads from config.json, else heads are 64 wide."""
    from transformers import BertConfig

    try:
        vocab, width = state["bert.embeddings.word_embeddings.weight"].shape
        positions = state["bert.embeddings.position_embeddings.weight"].shape[0]
        inner = state["bert.encoder.layer.0.intermediate.dense.weight"].shape[0]
        layers = {int(name.split(".")[3]) for name in state if name.startswith("bert.encoder.layer.")}
        sizes = tuple(state[f"linear_heads.{index}.weight"].shape[0] for index in range(len(HEAD_SIZES)))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"The weights in {folder} are not CheXbert's: {error} is missing or has another shape.") from error
    if sizes != HEAD_SIZES:
        raise CheckpointError(f"The heads in {folder} have {sizes} classes; CheXbert's have {HEAD_SIZES}.")
    try:
        heads = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_attention_heads"])
    except FileNotFoundError:
        heads = width // _HEAD_WIDTH
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not tell num_attention_heads; copy BERT's own, or leave it out.") from error
    if heads < 1 or width % heads:
        raise CheckpointError(f"BERT is {width} wide, which {heads} attention heads do not divide; give its config.json.")
    return BertConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=positions,
    )


def _tokenizer(vocabulary: Path, vocab_size: int) -> Tokenizer:
    """BERT's uncased WordPiece."""
    try:
        model = models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]", max_input_chars_per_word=100)  # noqa: S106
    # The Rust side raises bare Exception for a damaged file.
    except Exception as error:
        raise CheckpointError(f"{vocabulary} cannot be read; copy the vocab.txt of bert-base-uncased.") from error
    tokenizer = Tokenizer(model)
    special = {token: tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")}
    if None in special.values() or special["[PAD]"] != 0 or tokenizer.get_vocab_size() != vocab_size:
        raise CheckpointError(
            f"{vocabulary} has {tokenizer.get_vocab_size()} entries and the weights {vocab_size}, or it lacks [PAD] (first), [UNK], [CLS] "
            "or [SEP]; copy the vocab.txt of bert-base-uncased."
        )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, special[token]) for token in ("[CLS]", "[SEP]")]
    )
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
