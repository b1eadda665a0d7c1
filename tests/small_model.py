"""A small model, its tokenizers and random batches, for tests of the model and the losses."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from ssacl.anatomy import FINDINGS, LEAVES, NODES
from ssacl.config import Config, parse_config
from ssacl.data.records import Batch
from ssacl.models.ssacl import SSACL

LM_VOCAB = 53


class _LanguageVocabulary:
    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self) -> int:
        return LM_VOCAB


def small_tokenizers() -> Any:
    words = sorted({word for node in NODES for word in node.split()} | {"effusion", "no"})
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    text = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    return SimpleNamespace(text=text, lm=_LanguageVocabulary())


def small_config(**changes: Any) -> Config:
    """A 32-px model of a 4 x 4 grid; `changes` are dotted keys with double underscores, as `losses__mask_ratio=0.25`."""
    tree: dict[str, Any] = {
        "data": {"text_max_tokens": 16, "lm_max_tokens": 16},
        "model": {
            "vision": {
                "image_size_px": 32,
                "patch_size_px": 8,
                "width": 24,
                "depth": 2,
                "num_heads": 2,
                "mlp_ratio": 2,
                "decoder_width": 16,
                "decoder_depth": 2,
                "decoder_num_heads": 2,
            },
            "text": {"width": 20, "depth": 1, "num_heads": 2, "ffn_width": 24, "max_tokens": 16},
            "language": {"width": 16, "depth": 1, "num_heads": 2, "max_positions": 96},
        },
        # A mild logit scale keeps every loss away from its floor, where differences would hide.
        "losses": {"initial_tau": 3.0},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        section = tree
        for part in path:
            section = section.setdefault(part, {})
        section[last] = value
    return parse_config(tree)


def small_model(config: Config, seed: int = 0) -> SSACL:
    torch.manual_seed(seed)
    model = SSACL.from_config(config, small_tokenizers())
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        # Biases and norms away from zeros and ones: a term that forgets one must show.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def random_batch(rows: int, config: Config, seed: int = 0, sentences_per_row: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def ints(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    def lengths(longest: int, shortest: int = 1) -> Tensor:
        return torch.arange(longest) < torch.randint(shortest, longest + 1, (rows, 1), generator=generator)

    vocab = small_tokenizers().text.get_vocab_size()
    side, patches = config.model.vision.image_size_px, config.model.vision.num_patches
    sentences = rows * sentences_per_row
    return Batch(
        image=torch.randn(rows, 3, side, side, generator=generator),
        text_ids=ints(vocab, rows, 9),
        text_mask=lengths(9, 2),
        prompt_ids=ints(LM_VOCAB, rows, 4),
        prompt_mask=lengths(4) & (torch.rand(rows, 1, generator=generator) < 0.6),
        report_ids=ints(LM_VOCAB, rows, 7),
        report_mask=lengths(7),
        leaf_mask=torch.rand(rows, len(LEAVES), generator=generator) < 0.5,
        labels=ints(4, rows, len(FINDINGS)),
        has_text=torch.ones(rows, dtype=torch.bool),
        has_labels=torch.ones(rows, dtype=torch.bool),
        entities=ints(4, rows, len(LEAVES), len(FINDINGS)),
        sentence_ids=ints(vocab, sentences, 5),
        sentence_mask=torch.ones(sentences, 5, dtype=torch.bool),
        sentence_row=torch.arange(sentences) // max(1, sentences_per_row),
        sentence_leaves=torch.rand(sentences, len(LEAVES), generator=generator) < 0.2,
        sentence_finding=ints(len(FINDINGS) + 1, sentences),
        mask_noise=torch.rand(rows, patches, generator=generator),
        warp=0.1 * torch.randn(rows, 4, generator=generator),
        warp_padding=ints(3, rows),
    )


def without_text(batch: Batch, rows: list[int]) -> Batch:
    """`batch` with the reports of `rows` taken away."""
    flags = batch.has_text.clone()
    flags[rows] = False
    return replace(
        batch,
        has_text=flags,
        text_mask=batch.text_mask & flags[:, None],
        prompt_mask=batch.prompt_mask & flags[:, None],
        report_mask=batch.report_mask & flags[:, None],
    )


def take_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows of a batch, without its sentences."""
    per_row = {item.name for item in fields(batch) if item.name not in ("keys",) and not item.name.startswith("sentence_")}
    sliced = {name: getattr(batch, name)[start:stop] for name in per_row}
    empty = {item.name: getattr(batch, item.name)[:0] for item in fields(batch) if item.name.startswith("sentence_")}
    return replace(batch, **sliced, **empty)
