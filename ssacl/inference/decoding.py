"""Image prefix + entities -> report tokens, with the positions of training.

In training, positions run over all slots, masked ones included. Here masked slots are left out (they cost time in every step and change
nothing) while the others keep the positions that they had.

Shape letters: B images, P prefix slots, W language width, L slots kept, T new tokens.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ssacl.data.tokenization import Tokenizers
from ssacl.errors import GenerationError
from ssacl.models.language import LanguageDecoder


class TimeLimitError(GenerationError):
    """The time limit of `GenerationOptions` was reached before the report was finished."""


class GenerationOptions(BaseModel):
    """How text is searched for. The defaults are ours; `GenerationOptions.release()` gives the release's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_beams: int = Field(default=3, ge=1, le=16)
    repetition_penalty: float = Field(default=1.0, ge=1.0, le=10.0, description="Above 1, tokens already written become less likely.")
    length_penalty: float = Field(default=1.0, ge=-10.0, le=10.0, description="Exponent of the length that beam scores are divided by.")
    max_new_tokens: int = Field(default=120, ge=1, le=1024)
    min_new_tokens: int = Field(default=1, ge=0, le=1024)
    entities: bool = Field(default=True, description="The prompt names the findings that the head sees; without, the film alone speaks.")
    deterministic: bool = Field(default=False, description="Only deterministic kernels; slower on a GPU.")
    time_limit_s: float | None = Field(default=None, gt=0, description="For one call of `generate`; reaching it is an error.")
    max_batch_size: int = Field(default=8, ge=1, description="Images encoded and decoded together.")

    @classmethod
    def release(cls) -> GenerationOptions:
        """Settings of the published release."""
        return cls(num_beams=3, repetition_penalty=2.0, length_penalty=2.0, max_new_tokens=100, min_new_tokens=80)


def decode(
    language: LanguageDecoder,
    tokenizers: Tokenizers,
    prefix_BPW: Tensor,
    prefix_mask_BP: Tensor,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    deadline: float | None = None,
) -> list[list[int]]:
    """Report tokens of each image, without the newline that ends them.

    Parameters
    ----------
    language
        In eval mode.
    tokenizers
        The model's.
    prefix_BPW, prefix_mask_BP
        Image prefix, and which of its slots may be attended to.
    prompts
        Token ids of each image's entities, newline included.
    options
        Search settings.
    deadline
        `time.monotonic()` value after which the search fails.

    Raises
    ------
    GenerationError
        Prefix and prompt fill the language model's positions.
    TimeLimitError
        The deadline passed.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    end = tokenizers.lm.eos_token_id
    stops = sorted({tokenizers.newline_id} | ({end} if end is not None else set()))
    rows, positions = _kept_slots(language, prefix_BPW, prefix_mask_BP, prompts)
    room = language.max_positions - max(int(row[-1]) for row in positions) - 1
    if room < 1:
        raise GenerationError(
            f"Prefix and entities fill all {language.max_positions} positions of the language model: no room for a report. "
            "Train with a larger model.language.max_positions."
        )
    embeds_BLW, mask_BL, positions_BL = _left_padded(rows, positions)
    max_new = min(options.max_new_tokens, room)
    config = GenerationConfig(
        num_beams=options.num_beams,
        do_sample=False,
        repetition_penalty=options.repetition_penalty,
        length_penalty=options.length_penalty if options.num_beams > 1 else None,
        early_stopping=options.num_beams > 1,
        max_new_tokens=max_new,
        min_new_tokens=min(options.min_new_tokens, max_new),
        eos_token_id=stops,
        pad_token_id=tokenizers.lm_pad_id,
    )
    with torch.inference_mode(), _deterministic(options.deterministic):
        sequences = language.model.generate(
            inputs_embeds=embeds_BLW,
            attention_mask=mask_BL,
            position_ids=positions_BL,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Deadline(deadline)]),
        )
    return [_until_stop(row, {*stops, tokenizers.lm_pad_id}) for row in sequences.tolist()]


def token_probabilities(
    language: LanguageDecoder,
    prefix_BPW: Tensor,
    prefix_mask_BP: Tensor,
    prompts: Sequence[Sequence[int]],
    reports: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Probability of each report token given the image and what stands before it, by the forward pass of training.

    Search scores would not do: penalties and beams change them.
    """
    device, num_prefix = prefix_BPW.device, prefix_BPW.shape[1]
    texts = [[*prompt, *report] for prompt, report in zip(prompts, reports, strict=True)]
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long, device=device)
    present = torch.zeros(len(texts), longest, dtype=torch.bool, device=device)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text, dtype=torch.long, device=device)
        present[row, : len(text)] = True
    with torch.inference_mode():
        embeds = torch.cat([prefix_BPW, language.embed(ids).to(prefix_BPW.dtype)], 1)
        hidden = language(embeds, torch.cat([prefix_mask_BP.bool(), present], 1))
        # The slot before a token predicts it.
        scores = language.logits(hidden[:, num_prefix - 1 : -1]).float().log_softmax(-1)
        chosen = scores.gather(2, ids[:, :, None])[..., 0].exp().tolist()
    return [chosen[row][len(prompt) : len(text)] for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True))]


class _Deadline:
    """A stopping criterion that fails instead of cutting a report in the middle of a sentence."""

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise TimeLimitError(
                "The time limit was reached before the report was finished: raise time_limit_s, or lower num_beams or max_new_tokens."
            )
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _kept_slots(
    language: LanguageDecoder, prefix_BPW: Tensor, prefix_mask_BP: Tensor, prompts: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Embeddings [L_b, W] and training positions [L_b] of the slots that may be attended to, per image."""
    num_prefix = prefix_BPW.shape[1]
    rows, positions = [], []
    for prefix, mask, prompt in zip(prefix_BPW, prefix_mask_BP, prompts, strict=True):
        kept = mask.bool().nonzero()[:, 0]
        ids = torch.tensor([list(prompt)], dtype=torch.long, device=prefix.device)
        rows.append(torch.cat([prefix[kept], language.embed(ids)[0].to(prefix.dtype)]))
        positions.append(torch.cat([kept, num_prefix + torch.arange(len(prompt), device=prefix.device)]))
    return rows, positions


def _left_padded(rows: list[Tensor], positions: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=embeds.device)
    places = torch.zeros_like(mask)
    for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
        embeds[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
        places[index, longest - len(row) :] = position
    return embeds, mask, places


def _until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in stops:
            return tokens[:place]
    return tokens


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
