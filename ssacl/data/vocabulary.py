"""Vocabularies learnt from a corpus that is read once and never held: only how often each distinct word occurs is kept.

Both trainers see words in sorted order, so that the same texts give the same vocabulary in whatever order they come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END = "<|endoftext|>"
UNK = SPECIAL[1]
_REPEATS = 1000


class WordCounts:
    """How often each word occurs, as both tokenizers cut text into words; memory grows with distinct words, not with texts."""

    def __init__(self) -> None:
        self._normalizer, self._splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        # The newline stands alone, so that "end of report" is one token and never part of another.
        self._byte_splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self._words: Counter[str] = Counter()
        self._byte_words: Counter[str] = Counter()

    def add(self, texts: Iterable[str]) -> int:
        """Count the words of `texts`, white-space texts apart; returns how many there were."""
        number = 0
        for text in texts:
            if text.strip():
                number += 1
                self._words.update(word for word, _ in self._splitter.pre_tokenize_str(self._normalizer.normalize_str(text)))
                self._byte_words.update(word for word, _ in self._byte_splitter.pre_tokenize_str(f"{text}\n"))
        return number

    def wordpiece(self, vocab_size: int) -> Any:
        """A lower-cased WordPiece (`tokenizers.Tokenizer`) of at most `vocab_size` entries, more only where single characters need them."""
        # The trainer numbers "##x" pieces in the order of a hash map that differs from run to run, and breaks ties between merges by
        # number: all single characters are named in advance, as special tokens for the training only.
        characters = sorted(set("".join(self._words)))
        alphabet = [*characters, *(f"##{character}" for character in characters)]
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=[*SPECIAL, *alphabet], show_progress=False)
        trained = _train(Tokenizer(models.WordPiece(unk_token=UNK)), trainer, self._words)
        final = Tokenizer(models.WordPiece(trained.get_vocab(), unk_token=UNK, max_input_chars_per_word=100))
        final.normalizer, final.pre_tokenizer, final.decoder = self._normalizer, self._splitter, decoders.WordPiece()
        final.add_special_tokens(list(SPECIAL))
        return final

    def byte_pairs(self, vocab_size: int) -> Any:
        """A byte-level BPE (`transformers.PreTrainedTokenizerFast`) of at most `vocab_size` entries."""
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
        tokenizer = _train(Tokenizer(models.BPE()), trainer, self._byte_words)
        tokenizer.pre_tokenizer, tokenizer.decoder = self._byte_splitter, decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
        )


def _train(tokenizer: Any, trainer: Any, counts: Counter[str]) -> Any:
    # Words hold no white space: neither BERT's splitter nor the byte alphabet leaves any.
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(_repeated(counts), trainer=trainer)
    return tokenizer


def _repeated(counts: Counter[str]) -> Iterator[str]:
    """Each word as often as it was counted, in lines of at most `_REPEATS`: the trainers take texts, not counts."""
    for word in sorted(counts):
        whole, rest = divmod(counts[word], _REPEATS)
        for _ in range(whole):
            yield " ".join([word] * _REPEATS)
        if rest:
            yield " ".join([word] * rest)
