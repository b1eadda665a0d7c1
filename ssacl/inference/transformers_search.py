"""The same search by transformers' `generate`: where beams cannot share a cache, and as the yardstick of `search`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssacl.inference.options import GenerationOptions, check_deadline
from ssacl.inference.search import Slots
from ssacl.models.language import LanguageDecoder


def generate_tokens(
    language: LanguageDecoder,
    slots: Slots,
    options: GenerationOptions,
    stops: Sequence[int],
    pad: int,
    max_new_tokens: int,
    deadline: float | None = None,
) -> list[list[int]]:
    """Tokens of each report, with the stop that ends it and pads behind; raises as `decode`."""
    from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList

    several = options.num_beams > 1
    # Not by the configuration: `generate` then spares as many of a row's first words as the row has pads in front.
    penalties = [RepetitionPenaltyLogitsProcessor(options.repetition_penalty)] if options.repetition_penalty != 1.0 else []
    config = GenerationConfig(
        num_beams=options.num_beams,
        do_sample=False,
        length_penalty=options.length_penalty if several else None,
        early_stopping=options.early_stopping if several else False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(options.min_new_tokens, max_new_tokens),
        eos_token_id=list(stops),
        pad_token_id=pad,
    )
    embeds, present, positions = (
        _padded_in_front(each, slots.present_BP) for each in (slots.embeds_BPW, slots.present_BP, slots.positions_BP)
    )
    sequences: Tensor = language.model.generate(
        inputs_embeds=embeds,
        attention_mask=present.long(),
        position_ids=positions,
        generation_config=config,
        logits_processor=LogitsProcessorList(penalties),
        stopping_criteria=StoppingCriteriaList([_Deadline(deadline)]),
    )
    tokens: list[list[int]] = sequences.tolist()
    return tokens


class _Deadline:
    """A stopping criterion that fails instead of cutting a report in the middle of a sentence."""

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        check_deadline(self._deadline)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _padded_in_front(values: Tensor, present_BP: Tensor) -> Tensor:
    """Rows that are padded behind, padded in front: `generate` reads the last slot."""
    pads_B = present_BP.flip(1).long().argmax(1)
    return torch.stack([value.roll(int(pads), 0) for value, pads in zip(values, pads_B, strict=True)])
