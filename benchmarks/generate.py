"""Reports a second and time to the first token, against transformers' `generate` as the release uses it, on the same weights.

    python -m benchmarks.generate                       # batch 1 and 16 at the released size, random weights
    python -m benchmarks.generate --precisions fp32,bf16,int8
    python -m benchmarks.generate --checkpoint MODEL --data s3://bucket/films    # what bf16 and int8 cost on a trained model

The reference encodes the films with the plain model and calls `generate` with the whole prefix, masked slots too, repeated for every beam.
Ours encodes and writes as `ReportGenerator.load` prepares a model. Both get the same position ids and the release's settings; the length is
fixed (random weights hardly ever end a report), so that both take the same number of steps. They run in turns; a ratio is that of the
medians. Token ids must be identical in fp32.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.generate_quality import precision_quality
from benchmarks.parity import Vocabulary
from benchmarks.record import Goal, Measurement, run_benchmark
from benchmarks.train_step import PROMPT_TOKENS, SIZES, configuration, text_tokenizer
from ssacl.anatomy import LEAVES
from ssacl.inference.decoding import GenerationOptions, kept_slots
from ssacl.inference.precision import Precision, prepare
from ssacl.inference.search import Slots, search
from ssacl.inference.transformers_search import generate_tokens
from ssacl.models.ssacl import SSACL
from ssacl.training.precision import multiplies_bf16

logger = logging.getLogger("generate")
GOALS = {1: 1.3, 16: 2.5}
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
STOPS, PAD = [0], 0


@dataclass
class Way:
    """One way to write reports, and what it took."""

    name: str
    write: Callable[[int], list[list[int]]]
    """Tokens to write -> ids, film by film."""
    total_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def run(self, new_tokens: int) -> None:
        started = time.perf_counter()
        self.write(1)
        self.first_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        self.tokens = self.write(new_tokens)
        self.total_s.append(time.perf_counter() - started)
        logger.info("%s: first token %.2f s, all %.2f s", self.name, self.first_s[-1], self.total_s[-1])

    def figures(self, films: int) -> dict[str, Any]:
        return {
            "reports_per_s": round(films / statistics.median(self.total_s), 4),
            "s_per_batch": round(statistics.median(self.total_s), 3),
            "time_to_first_token_s": round(statistics.median(self.first_s), 3),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=sorted(SIZES), help="default base; small with --quick")
    parser.add_argument("--batches", default="1,16", help="films at once (default 1,16)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of every report (default 100, the release's most)")
    parser.add_argument("--rounds", type=int, help="turns of each way (default 3 at batch 1, 1 above)")
    parser.add_argument("--precisions", default="fp32,int8", help="of fp32,bf16,int8 (default fp32,int8)")
    parser.add_argument("--checkpoint", help="a trained model: token agreement and findings F1 of each precision on it")
    parser.add_argument("--data", help="data set of --checkpoint's films (validation split)")
    parser.add_argument("--limit", type=int, default=40, help="films of --data (default 40)")


def measure(options: argparse.Namespace) -> Measurement:
    """All ways in turns, batch size by batch size.

    Raises
    ------
    SSACLError
        The checkpoint or its data cannot be read.
    """
    preset = options.preset or ("small" if options.quick else "base")
    new_tokens = 20 if options.quick else options.tokens
    precisions = [name for name in PRECISIONS if name in options.precisions.split(",")]
    batches = [int(size) for size in options.batches.split(",")]
    figures: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    goals: dict[str, Goal] = {}
    models = _models(preset, precisions)
    for films in batches:
        prompts = _prompts(models["reference"], films)
        ways = [Way(f"{films}: reference", _reference(models["reference"], *prompts))]
        ways += [Way(f"{films}: {name}", _ours(models[name], name, *prompts)) for name in precisions]
        if films == batches[0]:
            for way in ways:
                way.write(2)
        for _ in range(1 if options.quick else options.rounds or (3 if films == 1 else 1)):
            for way in ways:
                way.run(new_tokens)
        rows = {way.name.split()[-1]: way.figures(films) for way in ways}
        reference = ways[0]
        for way in ways[1:]:
            row = rows[way.name.split()[-1]]
            row["times_faster"] = round(statistics.median(reference.total_s) / statistics.median(way.total_s), 3)
            row["times_faster_to_first_token"] = round(statistics.median(reference.first_s) / statistics.median(way.first_s), 3)
            row["token_agreement"] = _agreement(way.tokens, reference.tokens)
        if "fp32" in rows:
            goals[f"batch_{films}.fp32.token_agreement"] = Goal(min=1.0)
            if films in GOALS and preset == "base" and not options.quick:
                goals[f"batch_{films}.fp32.times_faster"] = Goal(min=GOALS[films])
        figures[f"batch_{films}"] = rows
        spread[f"batch_{films}"] = {way.name.split()[-1]: [round(min(way.total_s), 3), round(max(way.total_s), 3)] for way in ways}
    del models
    gc.collect()
    if options.checkpoint and options.data:
        limit = min(options.limit, 4) if options.quick else options.limit
        figures["trained"] = precision_quality(options.checkpoint, options.data, limit, PRECISIONS)
    config = {
        "preset": preset,
        "weights": "random",
        "tokens": new_tokens,
        "search": {"num_beams": 3, "repetition_penalty": 2.0, "length_penalty": 2.0},
        "prompt_tokens": PROMPT_TOKENS,
        "threads": torch.get_num_threads(),
        "bf16": "by the processor's own instructions" if multiplies_bf16(torch.device("cpu")) else "emulated by this processor",
    }
    return Measurement(figures, goals, config=config, n=1 if options.quick else options.rounds or 1, spread=spread)


def _models(preset: str, precisions: list[Precision]) -> dict[str, SSACL]:
    """The same random weights, plain for the reference and prepared for each precision."""
    config = configuration(preset, "paper")
    sizes = config.model
    tokenizers: Any = SimpleNamespace(text=text_tokenizer(sizes.text.vocab_size), lm=Vocabulary(sizes.language.vocab_size, 0))
    torch.manual_seed(0)
    plain = SSACL(sizes, config.losses, tokenizers).eval()
    models = {"reference": plain}
    for name in precisions:
        models[name] = copy.deepcopy(plain)
        prepare(models[name], name)
    # The release's GPT-2 has no attention of ours.
    plain.language.model.set_attn_implementation("eager")
    return models


def _prompts(model: SSACL, films: int) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Random films, half of their leaves kept, and prompts of one length."""
    generator = torch.Generator().manual_seed(films)
    side, vocab_size = model.config.vision.image_size_px, model.config.language.vocab_size
    image = torch.randn(films, 3, side, side, generator=generator)
    leaves = torch.rand(films, len(LEAVES), generator=generator) < 0.5
    return image, leaves, torch.randint(5, vocab_size, (films, PROMPT_TOKENS), generator=generator).tolist()


def _options(new_tokens: int) -> GenerationOptions:
    return GenerationOptions.release().model_copy(update={"max_new_tokens": new_tokens, "min_new_tokens": new_tokens})


def _reference(model: SSACL, image: Tensor, leaves: Tensor, prompts: list[list[int]]) -> Callable[[int], list[list[int]]]:
    def write(new_tokens: int) -> list[list[int]]:
        with torch.inference_mode():
            prefix, mask = model.prefix(model.encode(image), leaves)
            ids = torch.tensor(prompts)
            embeds = torch.cat([prefix, model.language.embed(ids)], 1)
            present = torch.cat([mask, torch.ones_like(ids, dtype=torch.bool)], 1)
            positions = torch.arange(embeds.shape[1]).expand(len(ids), -1)
            slots = Slots(embeds, present, positions, positions[:, -1] + 1)
            return generate_tokens(model.language, slots, _options(new_tokens), STOPS, PAD, new_tokens)

    return write


def _ours(model: SSACL, precision: str, image: Tensor, leaves: Tensor, prompts: list[list[int]]) -> Callable[[int], list[list[int]]]:
    def write(new_tokens: int) -> list[list[int]]:
        with torch.inference_mode():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                prefix, mask = model.prefix(model.encode(image), leaves)
            slots = kept_slots(model.language, prefix, mask, prompts)
            return [each.tokens for each in search(model.language, slots, _options(new_tokens), STOPS, new_tokens, None)]

    return write


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of places with the same token."""
    pairs = [one == other for own, their in zip(ours, theirs, strict=True) for one, other in zip(own, their, strict=True)]
    return round(sum(pairs) / len(pairs), 4)


if __name__ == "__main__":
    sys.exit(run_benchmark("generate", measure, add_arguments, description=__doc__.splitlines()[0]))
