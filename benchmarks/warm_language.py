"""What a language decoder gains from report texts alone: perplexity on texts that it never learned, before and after, and samples.

    python -m benchmarks.warm_language TEXTS [--epochs 10] [KEY=VALUE of model.language ...]

TEXTS is a CSV file with findings and impression, or a folder of .txt reports; the default is the real folder's. Beside the decoder stands
the best that word frequencies alone can do (unigrams of the same tokens). `copied_sentences`: share of the samples' sentences that
stand in the learned texts word for word.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.config import load_config
from ssacl.data.reports import split_sentences
from ssacl.data.tokenization import Tokenizers, train_tokenizers
from ssacl.progress import ProgressBar
from ssacl.training.warm_language import WarmOptions, read_report_texts, split_texts, warm_language

REAL = Path(__file__).parents[2] / "shared" / "data" / "real" / "reports_iu_nd" / "reports.csv"
SIZES = ("width=128", "depth=3", "num_heads=4", "max_positions=512", "dropout=0.1")
"""Those of configs/real_small.yaml."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts", nargs="?", type=Path, default=REAL)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of model.language")


def measure(options: argparse.Namespace) -> Measurement:
    """Teach a decoder of the given size; see `warm_language` for errors."""
    language = load_config(None, [f"model.language.{each}" for each in (*SIZES, *options.overrides)]).model.language
    warm = WarmOptions(num_epochs=1 if options.quick else options.epochs, seed=options.seed, language=language)
    texts = read_report_texts(options.texts)
    learned, held_out = split_texts(texts, warm.validation_share)
    tokenizers = train_tokenizers(learned, warm.vocab_size, warm.vocab_size)
    with tempfile.TemporaryDirectory() as folder, ProgressBar("warm-language", total=None, unit="steps") as bar:
        outcome = warm_language(texts, Path(folder) / "lm", warm, tokenizers, bar.advance, lambda total, _: bar.set_total(total))
    known = {sentence for text in learned for sentence in split_sentences(text)}
    drawn = [sentence for text in outcome.samples_after for sentence in split_sentences(text)]
    figures: dict[str, Any] = {
        "perplexity": {
            "before": round(outcome.perplexity_before, 1),
            "unigrams": round(_unigrams(learned, held_out, tokenizers), 1),
            "after": round(outcome.perplexity_after, 3),
        },
        "samples": {"before": [text[:160] for text in outcome.samples_before[:1]], "after": list(outcome.samples_after)},
        "copied_sentences": round(sum(sentence in known for sentence in drawn) / max(len(drawn), 1), 3),
        "texts": {"learned": outcome.num_train, "held_out": outcome.num_validation, "tokens_learned": outcome.num_tokens},
    }
    config = {"language": language.model_dump(mode="json"), "epochs": warm.num_epochs, "lr": warm.lr, "batch": warm.batch_size}
    goals = {"perplexity.after": Goal(max=figures["perplexity"]["unigrams"])}
    return Measurement(figures=figures, goals=goals, config=config, n=outcome.num_validation)


def _unigrams(learned: Sequence[str], held_out: Sequence[str], tokenizers: Tokenizers) -> float:
    """Perplexity of held-out tokens by their frequencies in the learned texts, one added to each count."""
    counts = Counter(token for text in learned for token in (*tokenizers.lm_ids(text), tokenizers.newline_id))
    total = sum(counts.values()) + len(tokenizers.lm)
    tokens = [token for text in held_out for token in (*tokenizers.lm_ids(text), tokenizers.newline_id)]
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens))


if __name__ == "__main__":
    sys.exit(run_benchmark("warm_language", measure, add_arguments, description=__doc__))
