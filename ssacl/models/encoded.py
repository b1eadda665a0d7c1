"""What one unmasked pass of the encoder gives: the shape between the encoder and everything that reads it.

Shape letters: B images, N patches, G = 32 nodes, M = 25 leaves, F = 14 findings, D vision width, T text width, L blocks.
"""
# ruff: noqa: N815 (fields carry shape letters)

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """An encoded image, from one unmasked pass with the 32 node queries."""

    nodes_BGD: Tensor
    leaves_BMD: Tensor
    cls_BD: Tensor
    patches_BND: Tensor
    attention_BGN: Tensor
    """float32, last block, mean over heads; each node's map sums to 1."""
    pooled_BD: Tensor
    """[B, 2 D]: mean patch and class token."""
    region_BMD: Tensor
    """[B, M, T]: attention-pooled local features of the leaves, in the text encoder's space."""
    local_BND: Tensor
    """Patches after the middle block."""
    patch_findings_BNF: Tensor
    """float32 logits: which finding each patch shows."""
    entities_BMF: Tensor
    """float32 logits: which finding is present at which leaf."""
    image_BCHW: Tensor
    """What was encoded."""
    contexts_BLTD: Tensor | None = None
    """Inputs of the L blocks, for further queries; `SSACL.encode` keeps them."""
