"""One joint training step, timed: forward, backward, optimizer; images a second; memory; share of the machine's matrix-product peak.

    python -m benchmarks.train_step --preset base --wiring paper --dtype bf16 --batch 4 --device cpu
    python -m benchmarks.train_step --compare            # release, official and paper in fp32, paper in bf16, in turns, with ratios

`base` is the released size with random weights. Losses are the five published ones. A batch is built directly: reports of 100 tokens for
both text models, prompts of 12, half of the leaves kept.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import resource
import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from benchmarks.parity import Vocabulary
from benchmarks.record import Goal, Measurement, run_benchmark
from benchmarks.release_cost import ReleaseWork
from benchmarks.train_flops import RELEASE_TEXT_TOKENS, Work, step_flops
from ssacl.anatomy import FINDINGS, LEAVES, NODES
from ssacl.config import Config, parse_config
from ssacl.data.records import Batch
from ssacl.errors import ConfigError
from ssacl.models.ssacl import SSACL
from ssacl.training.memory import set_freed_memory
from ssacl.training.speed import matmul_peak

logger = logging.getLogger("train_step")

WIRINGS, DTYPES = ("release", "official", "paper"), ("fp32", "bf16")
COMPARED = "release:fp32,official:fp32,paper:fp32,paper:bf16"
PROMPT_TOKENS = 12
UNKNOWN = "[UNK]"
SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    # Of the same form, for a look at whether everything runs.
    "small": {
        "vision": {"width": 192, "depth": 4, "num_heads": 3, "decoder_width": 192, "decoder_depth": 2, "decoder_num_heads": 3},
        "text": {"width": 96, "depth": 2, "num_heads": 3, "ffn_width": 384, "vocab_size": 2000},
        "language": {"width": 192, "depth": 4, "num_heads": 3, "vocab_size": 3000},
    },
}


@dataclass
class Timed:
    """What one variant took, by step."""

    wiring: str
    dtype: str
    compile: bool = False
    checkpointing: bool = False
    """Blocks are computed again in the backward pass."""
    without: frozenset[str] = frozenset()
    """Of the release's work: `release_cost.SAVINGS` that are taken."""
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    optimizer_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    work: Work = field(default_factory=Work)

    @property
    def name(self) -> str:
        return f"{self.wiring}_{self.dtype}"

    @property
    def gradient_s(self) -> list[float]:
        """Forward and backward of each step."""
        return [one + other for one, other in zip(self.forward_s, self.backward_s, strict=True)]

    def figures(self, rows: int, peak: float) -> dict[str, Any]:
        """Figures of this variant; `peak` is in operations a second."""
        gradient = statistics.median(self.gradient_s)
        step = gradient + statistics.median(self.optimizer_s)
        return {
            "forward_ms": _milliseconds(self.forward_s),
            "backward_ms": _milliseconds(self.backward_s),
            "optimizer_ms": _milliseconds(self.optimizer_s),
            "images_per_s": round(rows / step, 4),
            "peak_memory_gib": round(self.peak_bytes / 2**30, 3),
            "gflop": round(self.work.all_parts / 1e9, 2),
            "gflop_by_part": {part: round(count / 1e9, 2) for part, count in self.work.total.items()},
            "gflop_per_s": round(self.work.all_parts / gradient / 1e9, 2),
            "matmul_peak_gflop_per_s": round(peak / 1e9, 1),
            "mfu": round(self.work.all_parts / gradient / peak, 4),
        }

    def spread(self) -> dict[str, list[float]]:
        """Smallest and largest of each part, in milliseconds."""
        parts = {"forward_ms": self.forward_s, "backward_ms": self.backward_s, "optimizer_ms": self.optimizer_s}
        return {name: [round(1e3 * min(values), 2), round(1e3 * max(values), 2)] for name, values in parts.items()}


def configuration(preset: str, wiring: str, checkpointing: bool = False) -> Config:
    """The configuration of one variant; `release` and `official` share theirs."""
    model = {"wiring": "paper" if wiring == "paper" else "official", "activation_checkpointing": checkpointing, **SIZES[preset]}
    return parse_config(
        {
            "model": model,
            "losses": {"grounding": {"enabled": False}},
        }
    )


def text_tokenizer(vocab_size: int) -> Tokenizer:
    """A WordPiece of exactly this size that knows the words of the leaf names."""
    words = [*("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]"), *sorted({word for node in NODES for word in node.split()})]
    words += [f"filler{number}" for number in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return tokenizer


def build(config: Config, wiring: str, device: torch.device, without: frozenset[str] = frozenset()) -> nn.Module:
    """A fresh model with the same random weights for every wiring."""
    torch.manual_seed(0)
    sizes = config.model
    vocabulary = Vocabulary(sizes.language.vocab_size, 0)
    tokenizers: Any = SimpleNamespace(text=text_tokenizer(sizes.text.vocab_size), lm=vocabulary)
    # The paper's wiring reads vocabulary sizes from the tokenizers: here they are the configuration's.
    parts = (sizes, config.losses, tokenizers)
    model = ReleaseWork(*parts, without) if wiring == "release" else SSACL(*parts)
    return model.to(device).train()


def random_batch(config: Config, rows: int, device: torch.device) -> Batch:
    """Random rows with every field that the five losses read."""
    generator = torch.Generator().manual_seed(1)
    sizes = config.model
    text_tokens = min(RELEASE_TEXT_TOKENS, sizes.text.max_tokens)

    def ints(high: int, *shape: int) -> Tensor:
        return torch.randint(5, high, shape, generator=generator)

    def yes(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bool)

    side, nothing = sizes.vision.image_size_px, torch.zeros(0, dtype=torch.int64)
    return Batch(
        image=torch.randn(rows, 3, side, side, generator=generator),
        text_ids=ints(sizes.text.vocab_size, rows, text_tokens),
        text_mask=yes(rows, text_tokens),
        prompt_ids=ints(sizes.language.vocab_size, rows, PROMPT_TOKENS),
        prompt_mask=yes(rows, PROMPT_TOKENS),
        report_ids=ints(sizes.language.vocab_size, rows, config.data.lm_max_tokens),
        report_mask=yes(rows, config.data.lm_max_tokens),
        leaf_mask=torch.rand(rows, len(LEAVES), generator=generator) < 0.5,
        labels=torch.zeros(rows, len(FINDINGS), dtype=torch.int64),
        has_text=yes(rows),
        has_labels=yes(rows),
        entities=torch.zeros(rows, len(LEAVES), len(FINDINGS), dtype=torch.int64),
        sentence_ids=nothing.view(0, 1),
        sentence_mask=nothing.view(0, 1).bool(),
        sentence_row=nothing,
        sentence_leaves=nothing.view(0, 1).expand(0, len(LEAVES)).bool(),
        sentence_finding=nothing,
        mask_noise=torch.rand(rows, sizes.vision.num_patches, generator=generator),
        warp=torch.zeros(rows, 4),
        warp_padding=torch.zeros(rows, dtype=torch.int64),
    ).to(device)


def total_loss(model: nn.Module, batch: Batch, config: Config) -> Tensor:
    """The weighted sum of the five losses."""
    if isinstance(model, ReleaseWork):
        named: dict[str, Tensor] = model(batch)
        return torch.stack([float(getattr(config.losses, name)) * value.float() for name, value in named.items()]).sum()
    total: Tensor = model(batch, "joint").total
    return total.float()


def time_steps(timed: Timed, options: argparse.Namespace, steps: int, warm_up: int) -> None:
    """Run a fresh model for `warm_up` + `steps` steps and add the times of the last `steps`."""
    device = torch.device(options.device)
    # Ours as `ssacl train` runs; the release does no such thing.
    set_freed_memory("kept" if timed.wiring != "release" and not options.default_allocator else "default")
    config = configuration(options.preset, timed.wiring, timed.checkpointing)
    model, batch = build(config, timed.wiring, device, timed.without), random_batch(config, options.batch, device)
    core: SSACL = model.model if isinstance(model, ReleaseWork) else model  # type: ignore[assignment]
    timed.work = step_flops(core, batch, timed.wiring, timed.dtype, device.type == "cuda")
    # The findings head, the region head and the vocabulary head that no loss reads are not trained.
    groups = core.parameter_groups(config.optim, "joint")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)
    if timed.compile:
        core.compile_blocks()
    _reset_peak(device)
    for step in range(warm_up + steps):
        optimizer.zero_grad(set_to_none=True)
        autocast: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16) if timed.dtype == "bf16" else nullcontext()
        marks = [_now(device)]
        with autocast:
            total = total_loss(model, batch, config)
        marks.append(_now(device))
        total.backward()
        marks.append(_now(device))
        optimizer.step()
        marks.append(_now(device))
        logger.info("%s step %d: %s s", timed.name, step, " + ".join(f"{b - a:.2f}" for a, b in itertools.pairwise(marks)))
        if step >= warm_up:
            for values, start, end in zip((timed.forward_s, timed.backward_s, timed.optimizer_s), marks, marks[1:], strict=False):
                values.append(end - start)
    timed.peak_bytes = max(timed.peak_bytes, _peak(device))
    del model, core, optimizer, batch, total, groups
    gc.collect()
    # The next variant's memory is counted from nothing.
    set_freed_memory("default")


def measure(options: argparse.Namespace) -> Measurement:
    """Every variant in turns, a fresh model each time, so that a machine that slows down slows all of them."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a CUDA device; use --device cpu.")
    variants = _variants(options)
    rounds, steps, warm_up = (1, 1, 1) if options.quick else (options.rounds, options.steps, 1)
    device = torch.device(options.device)
    peaks = {"fp32": 0.0, "bf16": 0.0}
    for number in range(rounds):
        for timed in variants:
            logger.info("round %d of %d: %s", number + 1, rounds, timed.name)
            kind = torch.bfloat16 if timed.dtype == "bf16" else torch.float32
            # Before and after every turn: on a shared machine the peak seen once may be far from the machine's own.
            before = matmul_peak(kind, device)
            time_steps(timed, options, steps, warm_up)
            peaks[timed.dtype] = max(peaks[timed.dtype], before, matmul_peak(kind, device))
    figures: dict[str, Any] = {timed.name: timed.figures(options.batch, peaks[timed.dtype]) for timed in variants}
    goals: dict[str, Goal] = {}
    reference = next((timed for timed in variants if timed.name == "release_fp32"), None)
    if reference is not None:
        for timed in variants:
            figures[f"{timed.name}_times_faster"] = round(statistics.median(reference.gradient_s) / statistics.median(timed.gradient_s), 3)
    if options.preset == "base" and not options.quick:
        wanted = {
            "official_fp32_times_faster": 1.25,
            "paper_fp32_times_faster": 1.4,
            "paper_bf16_times_faster": 3.5,
            "paper_fp32.mfu": 0.6,
            "paper_bf16.mfu": 0.45,
        }
        goals = {name: Goal(min=value) for name, value in wanted.items() if name.split(".")[0] in figures}
    if len(variants) == 1:
        figures = variants[0].figures(options.batch, peaks[variants[0].dtype])
        goals = {name.split(".")[1]: goal for name, goal in goals.items() if "." in name}
    return Measurement(
        figures,
        goals,
        config={
            "preset": options.preset,
            "batch": options.batch,
            "device": options.device,
            "compile": options.compile,
            "threads": torch.get_num_threads(),
            "losses": "the five published ones, grounding off",
            "text_tokens": RELEASE_TEXT_TOKENS,
            "prompt_tokens": PROMPT_TOKENS,
            "peak_memory": "resident set of the process" if options.device == "cpu" else "allocated on the device",
            "freed_memory": "given back" if options.default_allocator else "kept by the process, as in training; in `release` given back",
            "warm_up_steps": warm_up,
        },
        n=rounds * steps,
        spread={timed.name: timed.spread() for timed in variants},
    )


def _variants(options: argparse.Namespace) -> list[Timed]:
    if options.compare is None:
        return [Timed(options.wiring, options.dtype, options.compile)]
    pairs = [item.partition(":") for item in options.compare.split(",")]
    if any(wiring not in WIRINGS or dtype not in DTYPES for wiring, _, dtype in pairs):
        raise ConfigError(f"--compare takes WIRING:DTYPE,... with {', '.join(WIRINGS)} and {', '.join(DTYPES)}; as in {COMPARED}.")
    return [Timed(wiring, dtype, options.compile and wiring != "release") for wiring, _, dtype in pairs]


def _milliseconds(values: list[float]) -> float:
    return round(1e3 * statistics.median(values), 2)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        # Linux starts the high-water mark of the resident set anew.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        logger.warning("the memory high-water mark cannot be reset: it is that of the whole process")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=sorted(SIZES), default="base")
    parser.add_argument("--wiring", choices=WIRINGS, default="paper")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images (default 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks, as engine.compile does")
    parser.add_argument("--rounds", type=int, default=3, help="times that each variant's turn comes, with a fresh model (default 3)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each turn (default 2)")
    parser.add_argument("--default-allocator", action="store_true", help="do not let the process keep freed memory, as training does")
    parser.add_argument(
        "--compare", nargs="?", const=COMPARED, metavar="WIRING:DTYPE,...", help=f"several variants in turns (default {COMPARED})"
    )


if __name__ == "__main__":
    sys.exit(run_benchmark("train_step", measure, add_arguments, description=__doc__.splitlines()[0]))
