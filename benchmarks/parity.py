"""Compares the `official` wiring with reference vectors of the release (METHOD section 7): losses, tensors, gradient norms.

    python -m benchmarks.parity DIR [--save]

Inputs come as arrays, not as a data set, so that the batch is built here.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from benchmarks.record import Goal, Measurement, run_benchmark
from ssacl.anatomy import LEAVES, NODES, leaf_mask
from ssacl.config import GroundingConfig, LossConfig
from ssacl.data.records import Batch
from ssacl.errors import DataError
from ssacl.losses import published
from ssacl.models.language import pack_text
from ssacl.models.official import HeadCounts, import_released, infer_config, read_released, released_name
from ssacl.models.ssacl import SSACL

LOSS_TOLERANCE = 1e-5
TENSOR_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = (1e-3, 1e-6)
_LOSSES = {
    "reconstruction": "image_reconstruction",
    "contrastive": "global_contrastive",
    "language": "language_model",
    "anatomy_reconstruction": "anatomy_reconstruction",
    "anatomical_consistency": "anatomical_consistency",
}


@dataclass(frozen=True)
class Vectors:
    """A folder of reference vectors."""

    expected: dict[str, Any]
    tensors: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    state: dict[str, Tensor]
    tokenizer: Tokenizer

    @classmethod
    def load(cls, folder: Path) -> Vectors:
        tokenizer = next(
            (path for path in (folder / "small_wordpiece.json", folder.parent / "small_wordpiece.json") if path.exists()), None
        )
        if tokenizer is None:
            raise DataError(
                "No small_wordpiece.json in the folder or beside it; METHOD section 7 says what a folder of reference vectors holds."
            )
        return cls(
            json.loads((folder / "expected.json").read_text(encoding="utf-8")),
            dict(np.load(folder / "expected.npz")),
            dict(np.load(folder / "inputs.npz")),
            read_released(folder / "official_layout.pth"),
            Tokenizer.from_file(str(tokenizer)),
        )


class Vocabulary:
    """All that a language model from scratch asks of a tokenizer; the vectors hold token ids only."""

    def __init__(self, size: int, pad_token_id: int) -> None:
        self.size, self.pad_token_id, self.bos_token_id, self.eos_token_id = size, pad_token_id, pad_token_id, pad_token_id

    def __len__(self) -> int:
        return self.size


def build_model(vectors: Vectors) -> SSACL:
    """The model of the folder's checkpoint, in eval mode."""
    config = vectors.expected["config"]
    heads = HeadCounts(
        config["vit"]["num_heads"],
        config["vit"]["decoder_num_heads"],
        config["bert"].get("num_attention_heads", 6),
        config["gpt2"]["n_head"],
    )
    sizes = infer_config(vectors.state, heads)
    losses = LossConfig(initial_tau=1.0, normalised_pixels=bool(config.get("norm_pix", False)), grounding=GroundingConfig(enabled=False))
    lm = Vocabulary(sizes.language.vocab_size, vectors.expected["pad_token_id"])
    model = SSACL(sizes, losses, SimpleNamespace(text=vectors.tokenizer, lm=lm))  # type: ignore[arg-type]
    import_released(model, vectors.state)
    return model.eval()


def build_batch(vectors: Vectors) -> Batch:
    inputs, expected = vectors.inputs, vectors.expected
    rows = len(inputs["image"])
    with_prompt = bool(expected["config"].get("prompt", True))
    nothing = np.zeros(0, dtype=np.int64)
    prompts = [inputs[f"lm_prompt_ids_{row}"] if with_prompt else nothing for row in range(rows)]
    targets = [inputs[f"lm_target_ids_{row}"] for row in range(rows)]
    prompt_ids, prompt_mask = _padded(prompts, expected["pad_token_id"])
    report_ids, report_mask = _padded(targets, expected["pad_token_id"])
    yes = torch.ones(rows, dtype=torch.bool)
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch(
        image=torch.from_numpy(inputs["image"]),
        text_ids=torch.from_numpy(inputs["text_ids"]),
        text_mask=torch.from_numpy(inputs["text_attention_mask"]).bool(),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        report_ids=report_ids,
        report_mask=report_mask,
        leaf_mask=torch.tensor([leaf_mask(groups) for groups in expected["anatomies"]]),
        labels=torch.zeros(rows, 14, dtype=torch.int64),
        has_text=yes,
        has_labels=~yes,
        entities=torch.zeros(rows, len(LEAVES), 14, dtype=torch.int64),
        sentence_ids=empty.view(0, 1),
        sentence_mask=empty.view(0, 1).bool(),
        sentence_row=empty,
        sentence_leaves=empty.view(0, 1).expand(0, len(LEAVES)).bool(),
        sentence_finding=empty,
        mask_noise=torch.from_numpy(inputs["mask_noise"]),
        warp=torch.zeros(rows, 4),
        warp_padding=torch.zeros(rows, dtype=torch.int64),
    )


def _padded(rows: list[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.from_numpy(row)
        mask[index, : len(row)] = True
    return ids, mask


@torch.no_grad()
def tensor_errors(model: SSACL, batch: Batch, expected: dict[str, np.ndarray]) -> dict[str, float]:
    """Maximum absolute error of every reference tensor; the largest float where a shape differs."""
    queries = model.node_queries()
    unmasked = model.encoder(batch.image, queries)
    keep, removed = published.split_patches(batch.mask_noise, model.losses.mask_ratio)
    plain = model.encoder(batch.image, None, keep)
    encoded = model.encode(batch.image)
    prefix, prefix_mask = model.prefix(encoded, batch.leaf_mask)
    text = pack_text(batch, gapless=False)
    mask = torch.cat([prefix_mask, text.mask_BL], 1)
    hidden = model.language(torch.cat([prefix, model.language.embed(text.ids_BL)], 1), mask)
    unread = torch.full_like(prefix_mask, -100, dtype=torch.int64)
    leaves = [NODES.index(leaf) for leaf in LEAVES]
    ours = {
        "leaf_queries": queries[leaves],
        "graph_queries": queries,
        "text_embedding": model.text(batch.text_ids, batch.text_mask),
        "unmasked_latent_with_graph_queries": torch.cat([unmasked.queries_BKD, unmasked.cls_BD[:, None], unmasked.patches_BVD], 1),
        "last_block_attention_prompts_to_patches": unmasked.attention_BKV,
        "reconstruction_pred": model.decoder.pred(model.decoder(plain.cls_BD, plain.patches_BVD, keep)),
        "patch_mask": torch.zeros_like(batch.mask_noise).scatter(1, removed, 1.0),
        "lm_logits": model.language.logits(hidden),
        "lm_targets": torch.cat([unread, text.ids_BL.masked_fill(~text.is_report_BL, -100)], 1),
        "lm_attention_mask": mask.long(),
    }
    errors: dict[str, float] = {}
    for name, reference in expected.items():
        tensor, wanted = ours[name], torch.from_numpy(reference)
        if tensor.shape != wanted.shape:
            errors[name] = sys.float_info.max
            continue
        difference = (tensor.double() - wanted.double()).abs()
        if name == "lm_logits":
            # Elsewhere the logits depend on how a library fills rows that nothing may attend to.
            difference = difference[torch.from_numpy(expected["lm_attention_mask"]).bool()]
        # A not-a-number would slip through a maximum.
        errors[name] = float(difference.max()) if bool(difference.isfinite().all()) else sys.float_info.max
    return errors


def gradient_errors(model: SSACL, expected: dict[str, float]) -> dict[str, float]:
    """Error of every gradient norm in units of its tolerance (<= 1 passes); the largest float when one is there that must not be."""
    norms = {
        released: -1.0 if parameter.grad is None else float(parameter.grad.norm())
        for name, parameter in model.named_parameters()
        if (released := released_name(name)) is not None
    }
    relative, absolute = GRADIENT_TOLERANCE
    errors = {}
    for name, wanted in expected.items():
        got = norms.get(name, -1.0)
        if (wanted < 0) != (got < 0) or not math.isfinite(got):
            errors[name] = sys.float_info.max
        else:
            errors[name] = 0.0 if wanted < 0 else abs(got - wanted) / (relative * wanted + absolute)
    return errors


def compare(folder: Path) -> dict[str, Any]:
    """Figures of one folder of reference vectors."""
    vectors = Vectors.load(folder)
    expected = vectors.expected
    if tuple(expected["node_order"]) != NODES or tuple(expected["leaf_order"]) != LEAVES:
        raise DataError("The reference vectors have another node or leaf order than ssacl.anatomy; they were made for another graph.")
    torch.manual_seed(0)
    model, batch = build_model(vectors), build_batch(vectors)
    weights = dict(zip(_LOSSES, expected["total_weights"], strict=True))
    losses = model(batch, "joint")
    named = losses.named()
    total = sum(weight * named[_LOSSES[name]] for name, weight in weights.items())
    nn.Module.zero_grad(model, set_to_none=True)
    total.backward()
    loss_errors = {name: float(named[ours].detach()) / expected["losses"][name] - 1 for name, ours in _LOSSES.items()}
    loss_errors["total"] = float(total.detach()) / expected["total"] - 1
    loss_errors = {name: abs(error) if math.isfinite(error) else sys.float_info.max for name, error in loss_errors.items()}
    tensors = tensor_errors(model, batch, vectors.tensors)
    gradients = gradient_errors(model, expected["grad_norms"])
    return {
        "loss_relative_error": loss_errors,
        "tensor_max_absolute_error": tensors,
        "gradient_error_in_tolerances": gradients,
        "worst_loss": max(loss_errors.values()),
        "worst_tensor": max(tensors.values()),
        "worst_gradient": max(gradients.values()),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder with official_layout.pth, inputs.npz, expected.json and expected.npz")


def measure(options: argparse.Namespace) -> Measurement:
    """Compare, on one folder; `--quick` changes nothing, the comparison is quick already."""
    return Measurement(
        figures=compare(options.folder),
        goals={"worst_loss": Goal(max=LOSS_TOLERANCE), "worst_tensor": Goal(max=TENSOR_TOLERANCE), "worst_gradient": Goal(max=1.0)},
        config={"wiring": "official", "dtype": "float32"},
    )


if __name__ == "__main__":
    sys.exit(run_benchmark("parity", measure, add_arguments, description=__doc__))
