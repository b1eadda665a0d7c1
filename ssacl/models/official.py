"""The released checkpoint's layout <-> ours (METHOD sections 2 and 7).

Every released tensor has a place: most map by name onto a parameter or buffer of `SSACL`; `EXTRAS` (the vocabulary head of the text
encoder's pre-training and an unused logit scale) take part in no computation, are not kept in the model, and travel beside it so that an
export gives back every bit; `WCE.weight` (class weights of the last training batch) is dropped by name. The parts of ours that the release
lacks (`OWN_PARTS`) keep their initial values.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssacl.config import ModelConfig
from ssacl.errors import CheckpointError
from ssacl.models.ssacl import SSACL

_PREFIXES: tuple[tuple[str, str], ...] = (
    # Released -> ours; the first prefix that fits wins.
    ("patch_embed.proj.", "encoder.patch_embed."),
    ("decoder_embed.", "decoder.embed."),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_norm.", "decoder.norm."),
    ("decoder_pred.", "decoder.pred."),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("mask_token", "decoder.mask_token"),
    ("cls_token", "encoder.cls_token"),
    ("pos_embed", "encoder.pos_embed"),
    ("blocks.", "encoder.blocks."),
    ("norm.", "encoder.norm."),
    ("Tpar", "tau"),
    ("bert_encoder.model.bert.", "text.bert."),
    ("img_mlp.", "img_mlp."),
    ("pos_weight_img.", "visibility."),
    ("opt_model.", "language.model."),
    ("opt_proj.", "opt_proj."),
    ("bert_proj.", "bert_proj."),
)
EXTRAS = ("logit_scale", "bert_encoder.model.cls.")
"""Prefixes of released tensors that no computation reads."""
DROPPED = {"WCE.weight": "class weights of the last training batch"}
OWN_PARTS = ("region.", "findings_head.", "leaf_findings.", "balance.")
"""Prefixes of our tensors that the release does not have."""
_TIED = ("opt_model.transformer.wte.weight", "opt_model.lm_head.weight")


@dataclass(frozen=True)
class HeadCounts:
    """Attention heads, which tensor shapes do not tell. Defaults: the released base size."""

    vision: int = 12
    decoder: int = 6
    text: int = 6
    language: int = 12


@dataclass(frozen=True)
class Imported:
    """What became of a released state."""

    extras: dict[str, Tensor]
    """Released names and tensors that the model does not hold; `export_released` wants them back."""
    dropped: dict[str, str]
    """Released name -> why it was dropped."""
    fresh: tuple[str, ...]
    """Our tensors that keep their initial values."""


def read_released(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a released `.pth` file; see `read_released_file`."""
    return read_released_file(path)[0]


def read_released_file(path: str | Path) -> tuple[dict[str, Tensor], int]:
    """Tensors and epoch of a released `.pth` file; nothing but tensors and plain values is ever unpickled.

    Raises
    ------
    CheckpointError
        The file cannot be read, holds other objects, or has no "model" part of tensors.
    """
    tree = unpickle_tensors(path)
    state = tree.get("model", tree) if isinstance(tree, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state_dict under 'model': it is not a checkpoint in the released layout.")
    epoch = tree.get("epoch", 0)
    return {str(name).removeprefix("module."): value for name, value in state.items()}, epoch if isinstance(epoch, int) else 0


def unpickle_tensors(path: str | Path) -> Any:
    """What torch.save wrote to `path`, where it holds nothing but tensors and plain values.

    Raises
    ------
    CheckpointError
        The file cannot be read, or holds other objects.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}. Give the path of the released .pth file.") from error
    # A file cut short makes torch seek before its start: an OSError.
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged, or holds objects other than tensors, which are never unpickled. Save its state_dict alone and try again."
        ) from error


def our_name(released: str) -> str | None:
    """Our name of a released tensor; None when we do not hold it."""
    for theirs, ours in _PREFIXES:
        if released.startswith(theirs):
            return ours + released[len(theirs) :]
    return None


def infer_config(state: Mapping[str, Tensor], heads: HeadCounts | None = None) -> ModelConfig:
    """Sizes of a released state from its shapes, in the `official` wiring.

    Raises
    ------
    CheckpointError
        A tensor that tells a size is missing, or sizes do not fit each other or the head counts.
    """
    heads = heads or HeadCounts()
    try:
        width, _, patch_px, _ = state["patch_embed.proj.weight"].shape
        num_patches = state["pos_embed"].shape[1] - 1
        grid = round(num_patches**0.5)
        if grid**2 != num_patches:
            raise ValueError(f"{num_patches} patches make no square grid")
        decoder_width = state["decoder_embed.weight"].shape[0]
        scale = round((state["decoder_pred.weight"].shape[0] / 3) ** 0.5 / patch_px)
        text_vocab, text_width = state["bert_encoder.model.bert.embeddings.word_embeddings.weight"].shape
        lm_vocab, lm_width = state["opt_model.transformer.wte.weight"].shape
        tree: dict[str, Any] = {
            "wiring": "official",
            "vision": {
                "image_size_px": grid * patch_px,
                "patch_size_px": patch_px,
                "width": width,
                "depth": _depth(state, "blocks."),
                "num_heads": heads.vision,
                "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
                "decoder_width": decoder_width,
                "decoder_depth": _depth(state, "decoder_blocks."),
                "decoder_num_heads": heads.decoder,
                "target_scale": 2 if scale == 2 else 1,
                "position_table": "official",
            },
            "text": {
                "width": text_width,
                "depth": _depth(state, "bert_encoder.model.bert.encoder.layer."),
                "num_heads": heads.text,
                "ffn_width": state["bert_encoder.model.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
                "vocab_size": text_vocab,
                "max_tokens": state["bert_encoder.model.bert.embeddings.position_embeddings.weight"].shape[0],
            },
            "language": {
                "width": lm_width,
                "depth": _depth(state, "opt_model.transformer.h."),
                "num_heads": heads.language,
                "vocab_size": lm_vocab,
                "max_positions": state["opt_model.transformer.wpe.weight"].shape[0],
            },
        }
        for part, count in ((text_width, heads.text), (lm_width, heads.language)):
            if part % count:
                raise ValueError(f"width {part} is not divisible by {count} heads")
        return ModelConfig.model_validate(tree)
    except KeyError as error:
        raise CheckpointError(f"The tensor {error} is missing: this is not a checkpoint in the released layout.") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"The checkpoint's sizes do not fit: {error}. Give the head counts that it was trained with.") from error


def import_released(model: SSACL, state: Mapping[str, Tensor]) -> Imported:
    """Fill `model` from a released state, strictly: every released tensor is used, kept as an extra, or dropped with a reason.

    Raises
    ------
    CheckpointError
        Tensors are missing, unknown, of another shape, or not finite.
    """
    own = model.state_dict()
    weights: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state.items():
        ours = our_name(name)
        if ours in own:
            weights[ours] = tensor
        elif name.startswith(EXTRAS):
            extras[name] = tensor
        elif name not in DROPPED:
            unknown.append(name)
    fresh = tuple(name for name in own if name.startswith(OWN_PARTS))
    missing = sorted(own.keys() - weights.keys() - set(fresh))
    shapes = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in weights.items()
        if value.shape != own[name].shape
    ]
    types = [
        f"{name} {str(value.dtype).removeprefix('torch.')} instead of {str(own[name].dtype).removeprefix('torch.')}"
        for name, value in weights.items()
        if value.dtype != own[name].dtype
    ]
    broken = [name for name, value in {**weights, **extras}.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    for what, names in (
        ("missing", missing),
        ("unknown", unknown),
        ("of another shape", shapes),
        ("of another type", types),
        ("not finite", broken),
    ):
        if names:
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            raise CheckpointError(
                f"{len(names)} tensors of the released checkpoint are {what}: {shown}. Check the file, the sizes and the tokenizers."
            )
    if not torch.equal(state[_TIED[0]], state[_TIED[1]]):
        raise CheckpointError(f"{_TIED[0]} and {_TIED[1]} differ, but the language model ties them: the checkpoint is not a GPT-2 release.")
    model.load_state_dict(weights, strict=False)
    return Imported(extras, {name: reason for name, reason in DROPPED.items() if name in state}, fresh)


def export_released(model: SSACL, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors under the released names, with the `extras` of the import; bit-exact.

    Raises
    ------
    CheckpointError
        The model is not of the released kind (GPT-2 decoder without LoRA), or `extras` lacks tensors of the layout.
    """
    state = {released: value.detach().cpu() for name, value in model.state_dict().items() if (released := released_name(name)) is not None}
    foreign = [name for name in model.state_dict() if released_name(name) is None and not name.startswith(OWN_PARTS)]
    if foreign or _TIED[0] not in state or re.search(r"\.lora_", " ".join(state)):
        raise CheckpointError("Only a model with the GPT-2 decoder of the release, without LoRA, has a place in the released layout.")
    if not all(any(name.startswith(prefix) for name in extras) for prefix in EXTRAS):
        raise CheckpointError(f"The released layout also holds {', '.join(EXTRAS)}*: give the extras that the import kept.")
    return {**state, **{name: value.detach().cpu() for name, value in extras.items()}}


def released_name(ours: str) -> str | None:
    """The released name of one of our tensors; None when the release has none."""
    for theirs, prefix in _PREFIXES:
        if ours.startswith(prefix):
            return theirs + ours[len(prefix) :]
    return None


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)), default=-1)
