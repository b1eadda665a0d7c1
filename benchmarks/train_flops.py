"""Matrix work of one joint training step, counted from shapes and split by part.

A product of [a, b] and [b, c] is 2abc operations. Only matrix products and convolutions count; norms, activations and softmax do not.
The backward pass of a linear layer is two products of the forward's size, of fused attention two and a half (it computes the scores again),
of the patch embedding one (images need no gradient); targets without gradient have none. tests/test_train_step.py compares the totals with
a count of the operations that torch really executes.

Shape letters: B images, N patches, V visible patches, G = 32 nodes, M = 25 leaves, D width, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ssacl.anatomy import CHILDREN, INNER_NODES, LEAVES, NODES
from ssacl.config import ModelConfig
from ssacl.data.records import Batch
from ssacl.losses.published import split_patches
from ssacl.models import vision
from ssacl.models.language import pack_text
from ssacl.models.ssacl import SSACL

RELEASE_TEXT_TOKENS = 100


@dataclass
class Work:
    """Operations by part: forward, and both directions together."""

    forward: dict[str, float] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, forward: float, backward_ratio: float = 2.0) -> None:
        self.forward[part] = self.forward.get(part, 0.0) + forward
        self.total[part] = self.total.get(part, 0.0) + forward * (1 + backward_ratio)

    @property
    def all_parts(self) -> float:
        return sum(self.total.values())


@dataclass(frozen=True)
class _Shape:
    """What the counts below depend on."""

    model: ModelConfig
    rows: int
    visible: int
    text_tokens: int
    leaf_tokens: int
    slots: int
    """Of the language model: all of them in the release's work; those that are looked at or predict a token in ours."""
    report_tokens: int
    fuses: bool
    """Attention of many tokens runs in the fused kernel."""
    cuda: bool


def step_flops(model: SSACL, batch: Batch, wiring: str, dtype: str, cuda: bool) -> Work:
    """Work of one step of `wiring` ("release", "official", "paper") on this batch."""
    keep, _ = split_patches(batch.mask_noise, model.losses.mask_ratio)
    shape = _Shape(
        model.config,
        len(batch),
        keep.shape[1],
        batch.text_ids.shape[1],
        model.leaf_ids.shape[1],
        _language_slots(model, batch, wiring),
        int(batch.report_mask.sum()),
        cuda or dtype == "fp32",
        cuda,
    )
    work = Work()
    if wiring == "release":
        _release(work, shape)
    else:
        _ours(work, shape, wiring == "official", model.losses.recursive_anatomy)
    return work


def _language_slots(model: SSACL, batch: Batch, wiring: str) -> int:
    prefix = len(LEAVES) + 1 + model.config.vision.num_patches
    if wiring == "release":
        return prefix + batch.prompt_ids.shape[1] + batch.report_ids.shape[1]
    text = pack_text(batch, gapless=wiring == "paper")
    before = torch.nn.functional.pad(text.is_report_BL, (-1, 1))
    in_text = (text.mask_BL | before).sum(1)
    return int((batch.leaf_mask.sum(1) + model.config.vision.num_patches + in_text).max())


def _ours(work: Work, shape: _Shape, official: bool, recursive: bool) -> None:
    sizes, B = shape.model.vision, shape.rows
    N, V, G = sizes.num_patches, shape.visible, len(NODES)
    _text(work, "text: reports", shape, B, shape.text_tokens)
    _text(work, "text: leaf names", shape, len(LEAVES), shape.leaf_tokens)
    _projections(work, shape, len(LEAVES))
    work.add("queries", 2.0 * G * len(LEAVES) * sizes.width, 1.0)
    context = 0 if official else 1
    readers = G + 1 if official else G
    _encoder(work, "encoder: unmasked, 32 nodes", shape, N, N + context, readers)
    _encoder(work, "encoder: masked, 32 nodes", shape, V, V + context, readers)
    if official:
        _encoder(work, "encoder: masked, no queries", shape, V, V + 1, 0)
    _reconstruction(work, shape, removed_only=True)
    groups = [list(INNER_NODES)] if official or not recursive else _levels()
    for group in groups:
        tokens = sum(1 + len(CHILDREN[node]) for node in group)
        work.add("L_ar: children", 2.0 * B * tokens * G * sizes.decoder_width, 1.0)
        _decoder(work, "L_ar: children", shape, tokens)
    _linear(work, "L_ar: children", B * G, sizes.width, sizes.decoder_width)
    _linear(work, "L_ar: children", B * len(INNER_NODES), sizes.decoder_width, _pixels(shape))
    _decoder(work, "L_ar: parents", shape, len(INNER_NODES), 0.0)
    _linear(work, "L_ar: parents", B * len(INNER_NODES), sizes.width, sizes.decoder_width, 0.0)
    _linear(work, "L_ar: parents", B * len(INNER_NODES), sizes.decoder_width, _pixels(shape), 0.0)
    _language(work, shape, shape.report_tokens)


def _release(work: Work, shape: _Shape) -> None:
    sizes, B = shape.model.vision, shape.rows
    N, V, G, M = sizes.num_patches, shape.visible, len(NODES), len(LEAVES)
    for part, rows in (("text: reports", B), ("text: leaf names", M)):
        _text(work, part, shape, rows, RELEASE_TEXT_TOKENS)
        _vocabulary_head(work, shape, rows * RELEASE_TEXT_TOKENS)
    _projections(work, shape, M)
    work.add("queries", 2.0 * G * M * sizes.width, 1.0)
    for part, patches, queries, ratio in (
        ("encoder: masked, no queries", V, 0, 2.0),
        ("encoder: unmasked, 25 leaves", N, M, 2.0),
        ("encoder: unmasked, 32 nodes", N, G, 0.0),
        ("encoder: masked, 32 nodes", V, G, 2.0),
    ):
        work.add(part, _embedding(shape), min(ratio, 1.0))
        for _ in range(sizes.depth):
            _block(work, part, B, patches + 1 + queries, sizes.width, _hidden(shape, sizes.width), ratio)
            work.add(part, 4.0 * B * sizes.width * (patches + 1 + queries) ** 2, ratio)
    _reconstruction(work, shape, removed_only=False, fuse=False)
    for node in INNER_NODES:
        for part, tokens, ratio in (("L_ar: children", 1 + len(CHILDREN[node]), 2.0), ("L_ar: parents", 1, 0.0)):
            _linear(work, part, B * tokens, sizes.width, sizes.decoder_width, ratio)
            _decoder(work, part, shape, tokens, ratio, fuse=False)
            _linear(work, part, B * tokens, sizes.decoder_width, _pixels(shape), ratio)
    _language(work, shape, B * shape.slots)


def _linear(work: Work, part: str, tokens: float, inputs: int, outputs: int, ratio: float = 2.0) -> None:
    work.add(part, 2.0 * tokens * inputs * outputs, ratio)


def _block(work: Work, part: str, rows: float, tokens: int, width: int, hidden: int, ratio: float = 2.0) -> None:
    """The four linear layers of a transformer block."""
    work.add(part, 2.0 * rows * tokens * (4 * width**2 + 2 * width * hidden), ratio)


def _attention(work: Work, part: str, shape: _Shape, tokens: int, width: int, ratio: float = 2.0, fuse: bool = True) -> None:
    fused = fuse and (shape.cuda or (shape.fuses and tokens >= vision._SDPA_TOKENS))
    work.add(part, 4.0 * shape.rows * width * tokens**2, 2.5 if fused and ratio else ratio)


def _encoder(work: Work, part: str, shape: _Shape, patches: int, context: int, readers: int) -> None:
    sizes = shape.model.vision
    work.add(part, _embedding(shape), 1.0)
    for _ in range(sizes.depth):
        _block(work, part, shape.rows, context + readers, sizes.width, _hidden(shape, sizes.width))
        _attention(work, part, shape, context, sizes.width)
        work.add(part, 4.0 * shape.rows * sizes.width * readers * patches)


def _embedding(shape: _Shape) -> float:
    sizes = shape.model.vision
    return 2.0 * shape.rows * sizes.num_patches * 3 * sizes.patch_size_px**2 * sizes.width


def _decoder(work: Work, part: str, shape: _Shape, tokens: int, ratio: float = 2.0, fuse: bool = True) -> None:
    sizes = shape.model.vision
    for _ in range(sizes.decoder_depth):
        _block(work, part, shape.rows, tokens, sizes.decoder_width, _hidden(shape, sizes.decoder_width), ratio)
        _attention(work, part, shape, tokens, sizes.decoder_width, ratio, fuse)


def _reconstruction(work: Work, shape: _Shape, removed_only: bool, fuse: bool = True) -> None:
    sizes = shape.model.vision
    part = "decoder: pixels"
    _linear(work, part, shape.rows * (1 + shape.visible), sizes.width, sizes.decoder_width)
    _decoder(work, part, shape, 1 + sizes.num_patches, fuse=fuse)
    tokens = sizes.num_patches - shape.visible if removed_only else 1 + sizes.num_patches
    _linear(work, part, shape.rows * tokens, sizes.decoder_width, _pixels(shape))


def _text(work: Work, part: str, shape: _Shape, rows: int, tokens: int) -> None:
    sizes = shape.model.text
    for _ in range(sizes.depth):
        _block(work, part, rows, tokens, sizes.width, sizes.ffn_width)
        work.add(part, 4.0 * rows * sizes.width * tokens**2, 2.5 if shape.cuda else 2.0)
    _linear(work, part, rows, sizes.width, sizes.width)


def _vocabulary_head(work: Work, shape: _Shape, tokens: int) -> None:
    sizes = shape.model.text
    # Computed and thrown away: no backward pass.
    _linear(work, "text: vocabulary head", tokens, sizes.width, sizes.width, 0.0)
    _linear(work, "text: vocabulary head", tokens, sizes.width, sizes.vocab_size, 0.0)


def _projections(work: Work, shape: _Shape, leaves: int) -> None:
    width, text = shape.model.vision.width, shape.model.text.width
    _linear(work, "queries", leaves, text, width)
    _linear(work, "contrast", shape.rows * shape.visible, width, text)


def _language(work: Work, shape: _Shape, logit_slots: int) -> None:
    sizes, vision_sizes = shape.model.language, shape.model.vision
    prefix = len(LEAVES) + 1 + vision_sizes.num_patches
    slots = shape.slots
    _linear(work, "language: prefix", shape.rows * prefix, vision_sizes.width, sizes.width)
    for _ in range(sizes.depth):
        _block(work, "language: blocks", shape.rows, slots, sizes.width, 4 * sizes.width)
        work.add("language: blocks", 4.0 * shape.rows * sizes.width * slots**2, 2.5 if shape.cuda else 2.0)
    _linear(work, "language: vocabulary head", logit_slots, sizes.width, sizes.vocab_size)


def _hidden(shape: _Shape, width: int) -> int:
    return int(width * shape.model.vision.mlp_ratio)


def _pixels(shape: _Shape) -> int:
    sizes = shape.model.vision
    return 3 * (sizes.patch_size_px * sizes.target_scale) ** 2


def _levels() -> list[list[str]]:
    height: dict[str, int] = {}
    for node in reversed(INNER_NODES):
        height[node] = 1 + max(height.get(child, 0) for child in CHILDREN[node])
    return [[node for node in INNER_NODES if height[node] == level] for level in range(1, max(height.values()) + 1)]
