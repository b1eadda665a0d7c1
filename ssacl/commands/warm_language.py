"""`ssacl warm-language`: a language decoder taught on report texts alone."""

from __future__ import annotations

import argparse

from ssacl.commands import Commands

EXAMPLES = """\
  ssacl warm-language --texts reports.csv --out lm width=256 depth=4 num_heads=4
  ssacl train --config CONFIG model.language.name_or_path=lm data.tokenizer_url=lm/tokenizers

KEY=VALUE are keys of model.language. The texts are split by content: perplexity is measured on texts that are never learned. A model can
repeat what it has read: keep the folder as private as the texts.
"""


def add_parsers(commands: Commands) -> None:
    parser = commands.add_parser(
        "warm-language",
        help="teach the language decoder on report texts alone, before it sees films",
        description="Writes a folder for model.language.name_or_path. The same command goes on at its last epoch.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--texts", required=True, metavar="PATH", help="CSV file, or folder of .txt reports")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--findings", default="findings", metavar="COLUMN", help="of the CSV file (%(default)s)")
    parser.add_argument("--impression", default="impression", metavar="COLUMN", help="of the CSV file (%(default)s)")
    parser.add_argument("--tokenizers", default="", metavar="URL", help="folder or s3:// prefix; trained from the texts if not given")
    parser.add_argument("--vocab-size", type=int, default=4000, help="of tokenizers trained here (%(default)s)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=256, help="longer reports are cut (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of model.language, as in width=256")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ssacl.config import load_config
    from ssacl.data.tokenization import Tokenizers
    from ssacl.progress import ProgressBar
    from ssacl.training.warm_language import TOKENIZERS, WarmOptions, read_report_texts, warm_language

    config = load_config(None, [f"model.language.{override}" for override in options.overrides])
    warm = WarmOptions(
        num_epochs=options.epochs,
        lr=options.lr,
        batch_size=options.batch_size,
        max_tokens=options.max_tokens,
        seed=options.seed,
        vocab_size=options.vocab_size,
        language=config.model.language,
    )
    texts = read_report_texts(options.texts, options.findings, options.impression)
    tokenizers = Tokenizers.load(options.tokenizers) if options.tokenizers else None
    with ProgressBar("warm-language", total=None, unit="steps") as bar:

        def started(total: int, done: int) -> None:
            bar.set_total(total)
            bar.start_at(done)

        outcome = warm_language(texts, options.out, warm, tokenizers, bar.advance, started)
    print(f"{outcome.num_train} texts learned; on {outcome.num_validation} others, perplexity per token: ", end="")
    print(f"{outcome.perplexity_before:.1f} before, {outcome.perplexity_after:.2f} after. Drawn from the model:")
    for sample in outcome.samples_after:
        print(f"  {sample}")
    print(f"use it: model.language.name_or_path={options.out} data.tokenizer_url={options.out}/{TOKENIZERS}")
    return 0
