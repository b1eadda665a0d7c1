"""Beam search of several images at once, by one pass over each prefix and a cache that the beams of an image share.

Shape letters: B images, K beams, P slots of the longest prefix with its prompt, W language width, V vocabulary.
"""

# ruff: noqa: N815 (fields carry shape letters)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssacl.inference.beams import Beams, Written
from ssacl.inference.options import GenerationOptions, check_deadline
from ssacl.inference.tree_cache import TreeCache
from ssacl.models.language import LanguageDecoder


@dataclass(frozen=True)
class Slots:
    """What stands before the reports: rows of unequal length, the shorter ones padded behind."""

    embeds_BPW: Tensor
    present_BP: Tensor
    """bool."""
    positions_BP: Tensor
    """Position of each slot."""
    next_B: Tensor
    """Position of each report's first token."""


def can_share(model: Any) -> bool:
    """Whether beams can share a cache in this model: it must look at all its past, by positions that it is told."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        kinds == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and (hasattr(config, "n_positions") or getattr(config, "rope_parameters", None) is not None)
    )


def search(
    language: LanguageDecoder, slots: Slots, options: GenerationOptions, stops: Sequence[int], max_new_tokens: int, deadline: float | None
) -> list[Written]:
    """The best report of each image; see `decode` for what is raised."""
    device, dtype = slots.embeds_BPW.device, slots.embeds_BPW.dtype
    num_images = len(slots.embeds_BPW)
    cache = TreeCache(slots.present_BP, options.num_beams, max_new_tokens, language.model.config.num_hidden_layers)
    hidden = _body(language, slots.embeds_BPW, cache.prefix_mask(dtype), slots.positions_BP, cache)
    last = slots.present_BP.sum(1) - 1
    logits = language.logits(hidden[torch.arange(num_images, device=device), last][:, None])
    beams = Beams(num_images, options, stops, max_new_tokens, device)
    positions = slots.next_B
    images, written = list(range(num_images)), [Written([], [])] * num_images
    while True:
        check_deadline(deadline)
        choice = beams.advance(logits)
        done = beams.done_B.tolist()
        if any(done):
            for row, image in enumerate(images):
                if done[row]:
                    written[image] = beams.best(row)
            rows = _rows_left(done)
            if not rows:
                return written
            index = torch.tensor(rows, device=device)
            beams.keep(index)
            cache.keep(rows)
            choice, positions, images = choice.keep(index), positions[index], [images[row] for row in rows]
        mask = cache.branch(choice.parents_BK, dtype)
        embeds = language.embed(choice.tokens_BK).to(dtype)
        hidden = _body(language, embeds, mask, positions[:, None].expand(-1, options.num_beams), cache)
        positions = positions + 1
        logits = language.logits(hidden)


def _rows_left(done: list[bool]) -> list[int]:
    """Rows that go on, as few as possible of them in another place: the last ones fill the gaps."""
    left = [row for row, over in enumerate(done) if not over]
    places = [row if row in set(left) else None for row in range(len(left))]
    spare = iter([row for row in left if row >= len(left)])
    return [next(spare) if row is None else row for row in places]


def _body(language: LanguageDecoder, embeds: Tensor, mask: Tensor, positions: Tensor, cache: TreeCache) -> Tensor:
    hidden: Tensor = language.model.base_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache.states, use_cache=True
    ).last_hidden_state
    return hidden
