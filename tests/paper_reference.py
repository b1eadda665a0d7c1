"""The `paper` wiring once more, slowly: image by image, with full attention masks, loops, and every logit.

Shares only the weights, BERT and GPT-2 with ssacl.models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ssacl.anatomy import CHILDREN, INNER_NODES, LEAVES, NODES
from ssacl.config import VisionConfig
from ssacl.data.records import Batch
from ssacl.models.ssacl import SSACL

Weights = dict[str, Tensor]


def reference_losses(model: SSACL, batch: Batch, recursive: bool) -> dict[str, Tensor]:
    """The five losses of METHOD section 4, `paper` wiring, without warp."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    config = model.config.vision
    rows = range(len(batch.image))
    leaf_queries = torch.stack([_leaf_query(model, weights, leaf) for leaf in range(len(LEAVES))])
    queries = _node_queries(leaf_queries)
    num_kept = batch.mask_noise.shape[1] // 2
    unmasked, masked, kept, reconstruction = [], [], [], []
    for row in rows:
        patches = _patches(batch.image[row], config.patch_size_px)
        order = batch.mask_noise[row].argsort()
        keep = order[:num_kept].tolist()
        unmasked.append(_encode(weights, config, patches, queries, list(range(len(patches)))))
        masked.append(_encode(weights, config, patches, queries, keep))
        kept.append(keep)
        reconstruction.append(_reconstruction(weights, config, patches, masked[-1], keep, order[num_kept:].tolist()))
    text = [model.text(batch.text_ids[row : row + 1], batch.text_mask[row : row + 1])[0] for row in rows]
    return {
        "image_reconstruction": torch.stack(reconstruction).mean(),
        "global_contrastive": _contrastive(weights, masked, kept, text, batch),
        "anatomy_reconstruction": _restoration(weights, config, unmasked, masked, recursive),
        "anatomical_consistency": _consistency(weights, unmasked, text),
        "language_model": _language(model, weights, unmasked, batch),
    }


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _block(weights: Weights, name: str, heads: int, x: Tensor, mask: Tensor) -> Tensor:
    query, key, value = _linear(weights, f"{name}.attn.qkv", _norm(weights, f"{name}.norm1", x)).chunk(3, -1)
    width = x.shape[-1] // heads
    outs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = query[:, part] @ key[:, part].T / math.sqrt(width)
        outs.append(torch.where(mask, logits, torch.tensor(-1e30)).softmax(-1) @ value[:, part])
    x = x + _linear(weights, f"{name}.attn.proj", torch.cat(outs, -1))
    hidden = functional.gelu(_linear(weights, f"{name}.mlp.fc1", _norm(weights, f"{name}.norm2", x)))
    return x + _linear(weights, f"{name}.mlp.fc2", hidden)


def _patches(image: Tensor, size: int) -> list[Tensor]:
    grid = image.shape[-1] // size
    return [image[:, r * size : (r + 1) * size, c * size : (c + 1) * size] for r in range(grid) for c in range(grid)]


def _leaf_query(model: SSACL, weights: Weights, leaf: int) -> Tensor:
    ids = model.leaf_ids[leaf][model.leaf_ids_mask[leaf]][None]
    return _linear(weights, "bert_proj", model.text(ids, torch.ones_like(ids, dtype=torch.bool)))[0]


def _node_queries(leaf_queries: Tensor) -> dict[str, Tensor]:
    found = dict(zip(LEAVES, leaf_queries, strict=True))

    def query(node: str) -> Tensor:
        if node not in found:
            children = [query(child) for child in CHILDREN[node]]
            found[node] = sum(children[1:], children[0]) / len(children)
        return found[node]

    return {node: query(node) for node in NODES}


def _encode(
    weights: Weights, config: VisionConfig, patches: list[Tensor], queries: dict[str, Tensor], keep: list[int]
) -> dict[str, Tensor]:
    """Node name -> output, "cls", and "patches" [V, D]."""
    kernel = weights["encoder.patch_embed.weight"].flatten(1)
    positions = weights["encoder.pos_embed"][0]
    tokens = [queries[node] for node in NODES] + [weights["encoder.cls_token"][0, 0] + positions[0]]
    tokens += [kernel @ patches[index].flatten() + weights["encoder.patch_embed.bias"] + positions[1 + index] for index in keep]
    num_queries, total = len(NODES), len(tokens)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for token in range(total):
        for seen in range(total):
            is_patch = seen > num_queries
            if token < num_queries:
                mask[token, seen] = seen == token or is_patch
            else:
                mask[token, seen] = seen == num_queries or is_patch
    x = torch.stack(tokens)
    for depth in range(config.depth):
        x = _block(weights, f"encoder.blocks.{depth}", config.num_heads, x, mask)
    x = _norm(weights, "encoder.norm", x)
    return {**{node: x[index] for index, node in enumerate(NODES)}, "cls": x[num_queries], "patches": x[num_queries + 1 :]}


def _decode(weights: Weights, config: VisionConfig, x: Tensor) -> Tensor:
    everything = torch.ones(len(x), len(x), dtype=torch.bool)
    for depth in range(config.decoder_depth):
        x = _block(weights, f"decoder.blocks.{depth}", config.decoder_num_heads, x, everything)
    return _norm(weights, "decoder.norm", x)


def _reconstruction(
    weights: Weights, config: VisionConfig, patches: list[Tensor], masked: dict[str, Tensor], keep: list[int], removed: list[int]
) -> Tensor:
    positions = weights["decoder.pos_embed"][0]
    tokens = [_linear(weights, "decoder.embed", masked["cls"]) + positions[0]]
    for index in range(len(patches)):
        if index in keep:
            token = _linear(weights, "decoder.embed", masked["patches"][keep.index(index)])
        else:
            token = weights["decoder.mask_token"][0, 0]
        tokens.append(token + positions[1 + index])
    pixels = _linear(weights, "decoder.pred", _decode(weights, config, torch.stack(tokens)))[1:]
    errors = [((pixels[index] - patches[index].permute(1, 2, 0).flatten()) ** 2).mean() for index in removed]
    return torch.stack(errors).mean()


def _contrastive(weights: Weights, masked: list[Weights], kept: list[list[int]], text: list[Tensor], batch: Batch) -> Tensor:
    images = [_linear(weights, "img_mlp", item["patches"]).mean(0) for item in masked]
    scales = []
    for keep in kept:
        visible = torch.zeros(batch.mask_noise.shape[1])
        visible[keep] = 1.0
        scales.append(functional.softplus(_linear(weights, "visibility", visible))[0])
    scale = torch.stack(scales)
    image_to_text = torch.stack([torch.stack([functional.cosine_similarity(v, t, 0) for t in text]) for v in images]) * weights["tau"]
    diagonal = torch.arange(len(text))
    total = torch.zeros(())
    for logits in (image_to_text, image_to_text.T):
        total = total + functional.cross_entropy(scale[:, None] * logits, diagonal)
        total = total + functional.cross_entropy(logits, diagonal, weight=scale.detach())
    return total / 4


def _restoration(
    weights: Weights, config: VisionConfig, unmasked: list[dict[str, Tensor]], masked: list[dict[str, Tensor]], recursive: bool
) -> Tensor:
    errors = []
    for whole, seen in zip(unmasked, masked, strict=True):
        standing = {node: _linear(weights, "decoder.embed", seen[node]) for node in NODES}
        for parent in reversed(INNER_NODES):
            children = torch.stack([standing[child] for child in CHILDREN[parent]])
            feature = _decode(weights, config, torch.cat([children.mean(0, keepdim=True), children]))[0]
            alone = _decode(weights, config, _linear(weights, "decoder.embed", whole[parent])[None])[0]
            if recursive:
                standing[parent] = feature
            target = _linear(weights, "decoder.pred", alone).detach()
            errors.append(((_linear(weights, "decoder.pred", feature) - target) ** 2).mean())
    return torch.stack(errors).mean()


def _consistency(weights: Weights, unmasked: list[dict[str, Tensor]], text: list[Tensor], share: float = 0.1) -> Tensor:
    leaves = [torch.stack([functional.normalize(item[leaf], dim=0) for leaf in LEAVES]) for item in unmasked]
    losses = []
    for a, leaf_a in enumerate(leaves):
        similarity = torch.stack([functional.cosine_similarity(text[a], other, 0) for other in text])
        soft = (weights["tau"] * similarity).softmax(0).detach()
        for b, leaf_b in enumerate(leaves):
            target = (1 - share) * torch.eye(len(LEAVES)) + share * soft[b]
            log_probability = (weights["tau"] * leaf_a @ leaf_b.detach().T).log_softmax(-1)
            losses.append(-(log_probability * target).sum(-1).mean())
    return torch.stack(losses).mean()


def _language(model: SSACL, weights: Weights, unmasked: list[dict[str, Tensor]], batch: Batch) -> Tensor:
    total, count = torch.zeros(()), 0
    for row, item in enumerate(unmasked):
        image = torch.stack([*(item[leaf] for leaf in LEAVES), item["cls"], *item["patches"]])
        prefix = _linear(weights, "opt_proj", image)
        prompt = batch.prompt_ids[row][batch.prompt_mask[row]]
        report = batch.report_ids[row][batch.report_mask[row]]
        words = torch.cat([prompt, report])
        embeds = torch.cat([prefix, weights["language.model.transformer.wte.weight"][words]])[None]
        mask = torch.cat([batch.leaf_mask[row].long(), torch.zeros(1).long(), torch.ones(len(item["patches"]) + len(words)).long()])[None]
        slots = torch.arange(embeds.shape[1])[None]
        logits = model.language.model(inputs_embeds=embeds, attention_mask=mask, position_ids=slots).logits[0]
        start = len(prefix) + len(prompt)
        for place, token in enumerate(report.tolist()):
            total = total - logits[start + place - 1].log_softmax(-1)[token]
            count += 1
    return total / count
