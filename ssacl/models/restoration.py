"""The anatomy graph as matrices: queries of inner nodes from their leaves, and inner nodes restored from masked children.

Shape letters: B images, G = 32 nodes, M = 25 leaves, I = 7 inner nodes, T tokens of one level, D width, Q pixel values of a patch.
"""
# ruff: noqa: N815 (fields carry shape letters)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ssacl.anatomy import CHILDREN, INNER_NODES, LEAF_INDEX, LEAVES, NODE_INDEX, NODES
from ssacl.models.vision import VisionDecoder

LEAF_NODES: tuple[int, ...] = tuple(NODE_INDEX[leaf] for leaf in LEAVES)
"""Where each leaf stands among the nodes."""
_INNER = tuple(NODE_INDEX[node] for node in INNER_NODES)


def graph_means() -> Tensor:
    """[G, M]: every node's query as a mean of leaf queries; an inner node is the mean of its children, from the bottom up."""
    rows: dict[str, Tensor] = {leaf: torch.eye(len(LEAVES))[index] for leaf, index in LEAF_INDEX.items()}
    for node in reversed(INNER_NODES):
        rows[node] = torch.stack([rows[child] for child in CHILDREN[node]]).mean(0)
    return torch.stack([rows[node] for node in NODES])


@dataclass(frozen=True)
class _Level:
    """Inner nodes that are restored together: all their token groups lie side by side in one sequence."""

    parents: Tensor
    """[P] node indices."""
    gather_TG: Tensor
    """Makes the sequence: for each parent the mean of its children, then the children."""
    mask_TT: Tensor
    """bool, block diagonal: a token sees its own group."""
    heads: Tensor
    """[P] where each group starts: the token that becomes the parent."""


def _level(parents: list[str]) -> _Level:
    rows: list[Tensor] = []
    groups: list[int] = []
    heads: list[int] = []
    for number, parent in enumerate(parents):
        children = torch.eye(len(NODES))[[NODE_INDEX[child] for child in CHILDREN[parent]]]
        heads.append(len(groups))
        rows += [children.mean(0, keepdim=True), children]
        groups += [number] * (1 + len(children))
    group = torch.tensor(groups)
    return _Level(torch.tensor([NODE_INDEX[parent] for parent in parents]), torch.cat(rows), group[:, None] == group, torch.tensor(heads))


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # Training may take what inference has cached.
def _levels(recursive: bool, device: torch.device) -> tuple[_Level, ...]:
    if not recursive:
        levels = [list(INNER_NODES)]
    else:
        height: dict[str, int] = {}
        for node in reversed(INNER_NODES):
            height[node] = 1 + max(height.get(child, 0) for child in CHILDREN[node])
        levels = [[node for node in INNER_NODES if height[node] == level] for level in range(1, max(height.values()) + 1)]
    return tuple(_Level(*(value.to(device) for value in vars(_level(level)).values())) for level in levels)


def restore_inner_nodes(decoder: VisionDecoder, nodes_BGD: Tensor, recursive: bool) -> Tensor:
    """Pixels [B, I, Q] of the inner nodes (`INNER_NODES` order) from the masked pass' node outputs (METHOD section 4.3).

    `recursive`: level by level from the bottom; the restored feature (before the pixel head, in the decoder's width) of an inner node
    stands for it among its parent's children. Else all at once, from the encoder's outputs.
    """
    nodes = decoder.embed(nodes_BGD)
    for level in _levels(recursive, nodes.device):
        features = decoder.refine(level.gather_TG.to(nodes.dtype) @ nodes, level.mask_TT)[:, level.heads]
        nodes = nodes.index_copy(1, level.parents, features.to(nodes.dtype))
    pixels: Tensor = decoder.pred(nodes[:, list(_INNER)])
    return pixels


@torch.no_grad()
def inner_node_pixels(decoder: VisionDecoder, nodes_BGD: Tensor) -> Tensor:
    """Pixels [B, I, Q] that the decoder gives for each inner node alone: the target of the restoration, without gradient."""
    nodes = decoder.embed(nodes_BGD[:, list(_INNER)])
    alone = torch.eye(len(_INNER), dtype=torch.bool, device=nodes.device)
    pixels: Tensor = decoder.pred(decoder.refine(nodes, alone))
    return pixels
