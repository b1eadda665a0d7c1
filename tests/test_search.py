"""Our search gives the tokens of transformers' `generate`, whatever the options, prompts and language model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import LM_VOCAB, small_tokenizers

from ssacl.config import LanguageConfig
from ssacl.inference.beams import Beams
from ssacl.inference.decoding import GenerationOptions, TimeLimitError, kept_slots, token_probabilities
from ssacl.inference.search import Slots, can_share, search
from ssacl.inference.transformers_search import generate_tokens
from ssacl.inference.tree_cache import TreeCache
from ssacl.models.language import LanguageDecoder

STOPS, PAD, NUM_PREFIX = [0, 3], 1, 20


def gpt2(seed: int) -> LanguageDecoder:
    """A random decoder whose words depend on what it sees and which ends reports early and late."""
    torch.manual_seed(seed)
    config = LanguageConfig(width=32, depth=2, num_heads=2, max_positions=128, vocab_size=LM_VOCAB)
    language = LanguageDecoder(config, small_tokenizers().lm).eval()
    with torch.no_grad():
        for name, value in language.named_parameters():
            value.add_((0.6 if "wte" in name or "wpe" in name else 0.2) * torch.randn_like(value))
    return language


def prompts(language: LanguageDecoder, num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    random = torch.Generator().manual_seed(seed)
    prefix = torch.randn(num_images, NUM_PREFIX, language.width, generator=random)
    mask = torch.rand(num_images, NUM_PREFIX, generator=random) < 0.7
    mask[:, 5] = True
    texts = [torch.randint(4, LM_VOCAB, (row % 4,), generator=random).tolist() for row in range(num_images)]
    return prefix, mask, texts


def until_stop(tokens: list[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in STOPS), len(tokens))]


def both(language: LanguageDecoder, slots: Slots, options: GenerationOptions) -> tuple[list[list[int]], list[list[int]]]:
    with torch.inference_mode():
        ours = [until_stop(each.tokens) for each in search(language, slots, options, STOPS, options.max_new_tokens, None)]
        theirs = generate_tokens(language, slots, options, STOPS, PAD, options.max_new_tokens)
    # Pads may stand in a report that has ended only.
    return ours, [until_stop(row) for row in theirs]


OPTIONS = st.builds(
    GenerationOptions,
    num_beams=st.sampled_from([1, 2, 3, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 2.0]),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.7, 1.0, 2.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
    max_new_tokens=st.sampled_from([1, 2, 9, 40]),
    min_new_tokens=st.sampled_from([0, 1, 6]),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(options=OPTIONS, seed=st.integers(0, 10_000), num_images=st.integers(1, 5))
def test_tokens_are_those_of_generate(options: GenerationOptions, seed: int, num_images: int) -> None:
    language = gpt2(seed % 7)
    slots = kept_slots(language, *prompts(language, num_images, seed))
    ours, theirs = both(language, slots, options)
    for row, tokens in enumerate(theirs):
        # What stands behind a cut report in a row of `generate` are its pads.
        assert ours[row] == tokens[: len(ours[row])]
        assert set(tokens[len(ours[row]) :]) <= {PAD}


def test_images_that_end_leave_the_batch_and_slots_that_nobody_sees_are_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    language = gpt2(3)
    slots = kept_slots(language, *prompts(language, 6, 1))
    options = GenerationOptions(num_beams=3, max_new_tokens=60, min_new_tokens=0)
    sizes: list[tuple[int, int]] = []
    branch = TreeCache.branch

    def seen(cache: TreeCache, parents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        mask = branch(cache, parents, dtype)
        sizes.append((mask.shape[0], mask.shape[3] - slots.embeds_BPW.shape[1]))
        return mask

    monkeypatch.setattr(TreeCache, "branch", seen)
    ours, theirs = both(language, slots, options)
    assert ours == [row[: len(own)] for own, row in zip(ours, theirs, strict=True)]
    assert len({rows for rows, _ in sizes}) > 1, "an image left before the others"
    assert max(slots for _, slots in sizes) < 3 * len(sizes), "the tree never held all that was written"


def test_probabilities_are_those_of_the_training_pass() -> None:
    language = gpt2(2)
    given_ = prompts(language, 3, 4)
    options = GenerationOptions(num_beams=3, max_new_tokens=12, repetition_penalty=2.0)
    with torch.inference_mode():
        written = search(language, kept_slots(language, *given_), options, STOPS, 12, None)
    expected = token_probabilities(language, *given_, [each.tokens for each in written])
    for each, row in zip(written, expected, strict=True):
        assert each.probabilities == pytest.approx(row, rel=1e-3, abs=1e-6)


def test_other_images_in_the_batch_change_nothing() -> None:
    language = gpt2(4)
    prefix, mask, texts = prompts(language, 4, 9)
    options = GenerationOptions(num_beams=3, max_new_tokens=20)
    with torch.inference_mode():
        together = search(language, kept_slots(language, prefix, mask, texts), options, STOPS, 20, None)
        for row in range(4):
            alone = kept_slots(language, prefix[row : row + 1], mask[row : row + 1], texts[row : row + 1])
            assert search(language, alone, options, STOPS, 20, None)[0].tokens == together[row].tokens


def test_a_rotary_model_shares_its_cache_too(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=LM_VOCAB, num_attention_heads=4, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn_like(value))
    model.save_pretrained(tmp_path)
    language = LanguageDecoder(LanguageConfig(name_or_path=str(tmp_path)), small_tokenizers().lm).eval()
    assert can_share(language.model)
    for seed in range(3):
        slots = kept_slots(language, *prompts(language, 3, seed))
        ours, theirs = both(language, slots, GenerationOptions(num_beams=3, max_new_tokens=20))
        assert ours == [row[: len(own)] for own, row in zip(ours, theirs, strict=True)]


def test_a_model_that_forgets_does_not_share() -> None:
    from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8, "num_attention_heads": 2}
    assert not can_share(MistralForCausalLM(MistralConfig(sliding_window=4, intermediate_size=16, num_key_value_heads=2, **sizes)))
    assert not can_share(BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=8)))


def test_the_time_limit_is_looked_at_in_every_step() -> None:
    language = gpt2(0)
    slots = kept_slots(language, *prompts(language, 1, 0))
    with torch.inference_mode(), pytest.raises(TimeLimitError, match="max_new_tokens"):
        search(language, slots, GenerationOptions(), STOPS, 20, time.monotonic() - 1)


def test_beams_by_hand() -> None:
    """Two beams, three words, one of which ends: every score by hand."""
    options = GenerationOptions(num_beams=2, min_new_tokens=0, length_penalty=1.0)
    beams = Beams(1, options, [0], 4, torch.device("cpu"))
    first = torch.tensor([0.2, 0.5, 0.3]).log()
    choice = beams.advance(first[None, None])
    # "1" and "2" lead; "0" is third and so neither goes on nor ends among the best.
    assert choice.tokens_BK.tolist() == [[1, 2]]
    assert not bool(beams.done_B[0])
    second = torch.tensor([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1]]).log()
    choice = beams.advance(second[None])
    # 1,1 scores .30; 2,0 scores .24 and ends; 1,2 with .15 takes its place.
    assert choice.tokens_BK.tolist() == [[1, 2]]
    assert choice.parents_BK.tolist() == [[0, 0]]
    third = torch.tensor([[0.9, 0.05, 0.05], [0.3, 0.3, 0.4]]).log()
    beams.advance(third[None])
    # 1,1,0: .27 over 3 words is better than .24 over 2; both places are taken, so the search is over.
    assert bool(beams.done_B[0])
    best = beams.best(0)
    assert best.tokens == [1, 1, 0]
    assert best.probabilities == pytest.approx([0.5, 0.6, 0.9])
