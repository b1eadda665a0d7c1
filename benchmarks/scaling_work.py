"""The presets as the scaling model's workloads: numbers, operations and activations, counted from shapes; nothing is computed.

Activations of a transformer block are 34 bytes for each token and unit of width (Korthikanti et al. 2022, section 4, with attention that
keeps no scores); with activation checkpointing 2 bytes for each block, and one block whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.scaling_model import Workload
from benchmarks.train_flops import Work, step_flops
from benchmarks.train_step import PROMPT_TOKENS, random_batch
from ssacl.anatomy import LEAVES, NODES
from ssacl.config import Config, load_config
from ssacl.models.ssacl import SSACL
from ssacl.training.dry_run import model_shapes

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = {"mimic_cxr_base": "joint", "mimic_cxr_large_lm": "generation"}
"""The stage of each preset that costs most."""
_UNUSED: dict[str, tuple[str, ...]] = {"joint": (), "contrastive": ("language",), "generation": ("decoder", "text")}
_BLOCK_BYTES, _KEPT_BYTES = 34.0, 2.0
_LOGIT_BYTES = 10.0
"""A logit in 16 and in 32 bits, and its gradient."""


def workload(preset: str, stage: str) -> Workload:
    """`stage` of `configs/PRESET.yaml`.

    Raises
    ------
    ConfigError
        The file is not there, or does not load.
    """
    config = load_config(CONFIGS / f"{preset}.yaml")
    model = model_shapes(config, [])
    settings = next(item for item in config.run.stages if item.kind == stage)
    groups = model.parameter_groups(config.optim, stage, settings.freeze_encoder)
    return Workload(
        preset=preset,
        stage=stage,
        num_parameters=_count(model),
        num_used=_count(model) - sum(_count(getattr(model, part)) for part in _UNUSED[stage]),
        num_trained=sum(parameter.numel() for group in groups for parameter in group["params"]),
        zero_stage=config.engine.zero_stage if config.engine.kind == "deepspeed" else 0,
        micro_batch_size=config.engine.micro_batch_size,
        accumulation_steps=config.engine.accumulation_steps,
        flops_per_image=_flops(model, config, stage, settings.freeze_encoder) / config.engine.micro_batch_size,
        activation_bytes_per_image=_activations(model, config, stage, settings.freeze_encoder),
        leaf_width=config.model.vision.width,
        text_width=config.model.text.width,
        contrasts=stage in ("contrastive", "joint"),
        grounds=config.losses.grounding.enabled,
        num_divisible=_count(model.language),
    )


def _flops(model: SSACL, config: Config, stage: str, frozen: bool) -> float:
    batch = random_batch(config, config.engine.micro_batch_size, torch.device("cpu"))
    work = step_flops(model, batch, "paper", config.engine.precision, cuda=True)
    if stage == "joint":
        return work.all_parts
    language = {part: count for part, count in work.total.items() if part.startswith("language")}
    if stage == "contrastive":
        total = work.all_parts - sum(language.values())
    elif config.model.language.name_or_path:
        total = _reads(work, frozen) + len(batch) * _given_language_flops(model, config)
    else:
        total = _reads(work, frozen) + sum(language.values())
    # Blocks of encoder and language model are computed again.
    return total * (4 / 3 if config.model.activation_checkpointing else 1)


def _reads(work: Work, frozen: bool) -> float:
    """The encoder's one pass over the whole film; forward only where nothing in it learns."""
    parts = ("encoder: unmasked, 32 nodes", "queries", "text: leaf names")
    return sum((work.forward if frozen else work.total)[part] for part in parts)


def _given_language_flops(model: SSACL, config: Config) -> float:
    """A causal language model of another make, by its numbers: forward, and back through weights that stay (LoRA's own are few)."""
    sizes = _language_sizes(model, config)
    tokens = _language_tokens(config)
    scores = 4.0 * sizes["depth"] * sizes["width"] * tokens**2
    passes = 2 if config.model.language.lora_rank else 3
    return passes * (2.0 * _count(model.language) * tokens + scores)


def _language_tokens(config: Config) -> int:
    # Prefix (half of the leaves, a film token, patches), prompt, report.
    return len(LEAVES) // 2 + 1 + config.model.vision.num_patches + PROMPT_TOKENS + config.data.lm_max_tokens


def _language_sizes(model: SSACL, config: Config) -> dict[str, int]:
    own: Any = config.model.language
    if not own.name_or_path:
        return {"depth": own.depth, "width": own.width, "vocabulary": own.vocab_size}
    given = next(part.config for part in model.language.modules() if hasattr(getattr(part, "config", None), "num_hidden_layers"))
    return {"depth": given.num_hidden_layers, "width": given.hidden_size, "vocabulary": given.vocab_size}


def _activations(model: SSACL, config: Config, stage: str, frozen: bool) -> float:
    vision, text, checkpointing = config.model.vision, config.model.text, config.model.activation_checkpointing
    visible = round(vision.num_patches * (1 - config.losses.mask_ratio))
    total = 0.0
    if stage in ("contrastive", "joint") or not frozen:
        for patches in (vision.num_patches, visible) if stage != "generation" else (vision.num_patches,):
            total += _blocks(vision.depth, vision.width, patches + 1 + len(NODES), checkpointing)
    if stage in ("contrastive", "joint"):
        # Pixels, children of the inner nodes, reports, some sentences.
        total += _blocks(vision.decoder_depth, vision.decoder_width, 1 + vision.num_patches + 2 * len(NODES), False)
        total += _blocks(text.depth, text.width, 2 * config.data.text_max_tokens, False)
    if stage in ("generation", "joint"):
        sizes = _language_sizes(model, config)
        total += _blocks(sizes["depth"], sizes["width"], _language_tokens(config), checkpointing)
        total += _LOGIT_BYTES * config.data.lm_max_tokens * sizes["vocabulary"]
    return total


def _blocks(depth: int, width: int, tokens: int, checkpointing: bool) -> float:
    if checkpointing:
        return width * tokens * (_KEPT_BYTES * depth + _BLOCK_BYTES)
    return _BLOCK_BYTES * depth * width * tokens


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
