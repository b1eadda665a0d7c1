"""What a configuration would do, said without doing it: the resolved tree, sizes, memory and steps. Starts nothing, trains nothing.

The model is built on the meta device: shapes without numbers, so that a language model of any size costs no memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ssacl.anatomy import LEAVES
from ssacl.config import Config
from ssacl.data.loader import open_split
from ssacl.data.storage import open_storage
from ssacl.errors import CheckpointError, DataError, SplitError, StorageError
from ssacl.models.ssacl import SSACL
from ssacl.training.footprint import rank_memory
from ssacl.training.stages import plan_stages
from ssacl.training.start import run_tokenizers

_GIB = 2**30


def dry_run(config: Config, world_size: int) -> str:
    """The resolved tree as YAML, and everything else as its comments: the whole text is a configuration that can be used again.

    Parameters
    ----------
    world_size : ranks that memory and steps are computed for.

    Raises
    ------
    SplitError
        `data.url` is no training data.
    ConfigError
        As the run itself would: the model cannot be built from this configuration.
    """
    samples, obstacle = _training_samples(config)
    obstacles = [obstacle] if obstacle else []
    lines = [f"Dry run for {world_size} rank{'s' if world_size > 1 else ''}: nothing is started.", ""]
    model = model_shapes(config, obstacles)
    trained = [_num_trained(model, config, stage.kind, stage.freeze_encoder) for stage in config.run.stages]
    lines += [*_parts(model, config, trained), "", *_memory(model, config, max(trained, default=0), world_size), ""]
    lines += _steps(config, world_size, samples)
    if config.run.use_gpu and not torch.cuda.is_available():
        obstacles.append("run.use_gpu is set, and this machine shows no GPU.")
    if obstacles:
        lines += ["", "Before this can run here:", *(f"- {text}" for text in obstacles)]
    return config.to_yaml() + "".join(f"# {line}".rstrip() + "\n" for line in lines)


def _training_samples(config: Config) -> tuple[int | None, str]:
    """Samples of the training split, or none and why they cannot be counted."""
    if not config.data.url:
        return None, "data.url is not set."
    try:
        return len(open_split(open_storage(config.data.url), "train", purpose="training")), ""
    except SplitError:
        raise
    except (DataError, StorageError) as error:
        return None, f"data.url: {error}"


def model_shapes(config: Config, obstacles: list[str]) -> SSACL:
    """The model without numbers; what had to be assumed is added to `obstacles`."""
    tokenizers: Any
    try:
        tokenizers = run_tokenizers(config, open_storage(config.data.url))
    except (CheckpointError, DataError, StorageError) as error:
        obstacles.append(f"Tokenizers: {error} Vocabularies are counted as large as the configuration allows.")
        tokenizers = SimpleNamespace(text=_Vocabulary(config.model.text.vocab_size), lm=_Vocabulary(_lm_vocab_size(config)))
    with _language_folder(config, obstacles) as known, torch.device("meta"):
        return SSACL.from_config(known, tokenizers)


@contextmanager
def _language_folder(config: Config, obstacles: list[str]) -> Iterator[Config]:
    """The configuration with a language model whose shape is known here."""
    name = config.model.language.name_or_path
    if not name or Path(name).is_dir():
        yield config
        return
    from transformers import LlamaConfig

    obstacles.append(
        f"model.language.name_or_path '{name}' is no folder here; counted is a model of 7 billion in its place (LLaMA's shape)."
    )
    with tempfile.TemporaryDirectory(prefix="ssacl-shape-") as folder:
        # The defaults of this class are the sizes of LLaMA 7B.
        LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        language = config.model.language.model_copy(update={"name_or_path": folder})
        yield config.model_copy(update={"model": config.model.model_copy(update={"language": language})})


def _lm_vocab_size(config: Config) -> int:
    # A language model that is read brings its own vocabulary; the stand-in must not be larger.
    return 1 if config.model.language.name_or_path else config.model.language.vocab_size


def _num_trained(model: SSACL, config: Config, kind: str, freeze_encoder: bool) -> int:
    groups = model.parameter_groups(config.optim, kind, freeze_encoder)
    return sum(parameter.numel() for group in groups for parameter in group["params"])


def _parts(model: SSACL, config: Config, trained: Sequence[int]) -> list[str]:
    own = sum(parameter.numel() for parameter in model.parameters(recurse=False))
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in model.named_children()}
    rows = [(name, count) for name, count in {**counts, "scalars": own}.items() if count]
    lines = ["Parameters by part (numbers, float32):", *(f"  {name:<16}{count:>16,}" for name, count in rows)]
    lines += [f"  {'all':<16}{_num_parameters(model):>16,}"]
    lines += [f"  trained in stage {i + 1}, {s.kind}: {n:,}" for i, (s, n) in enumerate(zip(config.run.stages, trained, strict=True))]
    return lines


def _num_parameters(model: SSACL) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _memory(model: SSACL, config: Config, num_trained: int, world_size: int) -> list[str]:
    lines = [
        "Memory per rank between steps in GiB, in the stage training most (P numbers, L of them the language model's, T trained, W ranks):",
        "  stage 0: 4P + 4T + 8T; 1: 4P + 4T + 12T/W; 2: 4P + 4T/W + 12T/W; 3: (4P + 4T + 12T)/W + 4(P - L).",
        "  Offloading moves 12T/W to the host. Stage 3 divides the language model; of the rest a whole copy stays on each rank.",
        "  Left out: activations, communication buckets, 16-bit copies of one forward pass. The live line shows what the first steps need.",
        f"  {'ZeRO':<6}{'weights':>10}{'gradients':>11}{'AdamW':>10}{'device':>10}{'| offload: device':>19}{'host':>9}",
    ]
    used = config.engine.zero_stage if config.engine.kind == "deepspeed" else 0
    language = sum(parameter.numel() for parameter in model.language.parameters())
    for stage in range(4):
        plain, moved = (rank_memory(_num_parameters(model), num_trained, stage, world_size, offload, language) for offload in (False, True))
        values = [plain.weights, plain.gradients, plain.optimizer, plain.device]
        row = f"  {stage:<6}" + "".join(f"{value / _GIB:>{width}.2f}" for value, width in zip(values, (10, 11, 10, 10), strict=True))
        row += f"{moved.device / _GIB:>19.2f}{moved.host / _GIB:>9.2f}"
        lines.append(row + (f"   <- {config.engine.kind}, offload {config.engine.offload}" if stage == used else ""))
    return lines


def _steps(config: Config, world_size: int, samples: int | None) -> list[str]:
    engine = config.engine
    per_pass = engine.micro_batch_size * world_size
    head = f"Steps ({per_pass * engine.accumulation_steps} samples each: {engine.micro_batch_size} x {world_size} ranks x "
    head += f"{engine.accumulation_steps} accumulated; "
    if samples is None:
        rows = [f"{stage.num_steps:,} steps" if stage.num_steps else f"{stage.num_epochs:g} epochs" for stage in config.run.stages]
        head += "samples of the training split not known here):"
        return [
            head,
            *(f"  stage {i + 1}, {stage.kind}: {row}" for i, (stage, row) in enumerate(zip(config.run.stages, rows, strict=True))),
        ]
    passes = -(-samples // per_pass) if config.data.last_batch == "wrap" else samples // per_pass
    if passes == 0:
        raise DataError(
            f"The training split has {samples} samples, fewer than one batch over all ranks ({world_size} ranks x "
            f"{engine.micro_batch_size}); lower engine.micro_batch_size or run.num_train_workers, or set data.last_batch=wrap."
        )
    lines = [f"{head}{samples:,} samples, {passes:,} passes an epoch):"]
    for plan in plan_stages(config, passes):
        epochs = plan.num_steps * engine.accumulation_steps / passes
        lines.append(
            f"  stage {plan.index + 1}, {plan.kind}: {plan.num_steps:,} steps ({plan.warmup_steps:,} warm-up), {epochs:.1f} epochs"
        )
    return lines


@dataclass(frozen=True)
class _Vocabulary:
    """Stands for a tokenizer that is not there: its size is known, and that every leaf's name is one token."""

    size: int
    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self) -> int:
        return self.size

    def get_vocab_size(self) -> int:
        return self.size

    def token_to_id(self, token: str) -> int:
        return 0

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(ids=[LEAVES.index(text)], attention_mask=[1])
