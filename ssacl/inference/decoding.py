"""Image prefix + entities -> report tokens, with the positions of training.

In training, positions run over all slots, masked ones included. Here masked slots are left out (they cost time in every step and change
nothing) while the others keep the positions that they had.

Shape letters: B images, P prefix slots, W language width, L slots kept, T new tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssacl.data.tokenization import Tokenizers
from ssacl.errors import GenerationError
from ssacl.inference.beams import Written
from ssacl.inference.options import GenerationOptions, TimeLimitError
from ssacl.inference.search import Slots, can_share, search
from ssacl.inference.transformers_search import generate_tokens
from ssacl.models.language import LanguageDecoder

__all__ = ["GenerationOptions", "TimeLimitError", "decode", "kept_slots", "token_probabilities"]


def decode(
    language: LanguageDecoder,
    tokenizers: Tokenizers,
    prefix_BPW: Tensor,
    prefix_mask_BP: Tensor,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    deadline: float | None = None,
) -> list[Written]:
    """Report tokens of each image, without the newline that ends them, each with its probability given the image and what stands before it.

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
    end = tokenizers.lm.eos_token_id
    stops = sorted({tokenizers.newline_id} | ({end} if end is not None else set()))
    with torch.inference_mode(), _deterministic(options.deterministic):
        slots = kept_slots(language, prefix_BPW, prefix_mask_BP, prompts)
        room = language.max_positions - int(slots.next_B.max())
        if room < 1:
            raise GenerationError(
                f"Prefix and entities fill all {language.max_positions} positions of the language model: no room for a report. "
                "Train with a larger model.language.max_positions."
            )
        max_new = min(options.max_new_tokens, room)
        if can_share(language.model):
            written = search(language, slots, options, stops, max_new, deadline)
            return [_until_stop(each, set(stops)) for each in written]
        pad = tokenizers.lm_pad_id
        tokens = generate_tokens(language, slots, options, stops, pad, max_new, deadline)
        reports = [_until_stop(Written(row, [0.0] * len(row)), {*stops, pad}).tokens for row in tokens]
        sure = token_probabilities(language, prefix_BPW, prefix_mask_BP, prompts, reports)
        return [Written(report, own) for report, own in zip(reports, sure, strict=True)]


def token_probabilities(
    language: LanguageDecoder,
    prefix_BPW: Tensor,
    prefix_mask_BP: Tensor,
    prompts: Sequence[Sequence[int]],
    reports: Sequence[Sequence[int]],
) -> list[list[float]]:
    """Probability of each token of any reports given the image and what stands before it, by the forward pass of training.

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


def kept_slots(language: LanguageDecoder, prefix_BPW: Tensor, prefix_mask_BP: Tensor, prompts: Sequence[Sequence[int]]) -> Slots:
    """Prefix slots that may be attended to and the prompt, side by side, with their positions in training; in the model's own precision."""
    num_prefix, device = prefix_BPW.shape[1], prefix_BPW.device
    dtype = language.model.get_input_embeddings().weight.dtype
    kept = [mask.bool().nonzero()[:, 0] for mask in prefix_mask_BP]
    lengths = [len(slots) + len(prompt) for slots, prompt in zip(kept, prompts, strict=True)]
    embeds = torch.zeros(len(kept), max(lengths), prefix_BPW.shape[2], dtype=dtype, device=device)
    positions = torch.zeros(len(kept), max(lengths), dtype=torch.long, device=device)
    for row, (slots, prompt) in enumerate(zip(kept, prompts, strict=True)):
        ids = torch.tensor([list(prompt)], dtype=torch.long, device=device)
        embeds[row, : lengths[row]] = torch.cat([prefix_BPW[row, slots].to(dtype), language.embed(ids)[0].to(dtype)])
        positions[row, : lengths[row]] = torch.cat([slots, num_prefix + torch.arange(len(prompt), device=device)])
    length_B = torch.tensor(lengths, device=device)
    present = torch.arange(max(lengths), device=device) < length_B[:, None]
    behind = positions.gather(1, length_B[:, None] - 1)[:, 0] + 1
    return Slots(embeds, present, positions, behind)


def _until_stop(written: Written, stops: set[int]) -> Written:
    length = next((place for place, token in enumerate(written.tokens) if token in stops), len(written.tokens))
    return Written(written.tokens[:length], written.probabilities[:length])


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
