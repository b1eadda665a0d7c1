"""The five published losses (METHOD section 4; arXiv 2509.25963, section 3): one function per loss, shapes in and out.

Shape letters: B rows of this rank, A rows of all ranks, N patches, V visible and R removed patches, Q pixel values of a patch, M leaves,
I inner nodes, T text width. Every function works in float32 and follows the convention of `ssacl.distributed`: the mean over ranks of what
it returns is the global loss, and averaged gradients are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ssacl.distributed import gather_detached, gather_with_gradient, local_rows, sum_over_ranks, world_size

_EXCLUDED = -1e4
"""Logit of a column that takes no part: finite, so that no gradient becomes 0 * inf."""
_PAIRS_PER_CHUNK = 2**22
"""Similarities of the anatomical consistency held at once."""


def split_patches(noise_BN: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """Kept [B, V] and removed [B, R] patch indices: the first share of the ascending argsort of `noise_BN` is kept."""
    order = noise_BN.argsort(1)
    num_kept = round(noise_BN.shape[1] * (1 - mask_ratio))
    return order[:, :num_kept], order[:, num_kept:]


def image_reconstruction(pixels_BRQ: Tensor, target_BRQ: Tensor, normalised: bool) -> Tensor:
    """L_ir: squared error averaged inside each removed patch, then over the removed patches.

    With `normalised` each target patch has mean 0 and unbiased variance 1 (+ 1e-6).
    """
    target = target_BRQ.float()
    if normalised:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    return (pixels_BRQ.float() - target).square().mean()


def global_contrastive(image_BT: Tensor, text_BT: Tensor, visibility_B: Tensor, has_text_B: Tensor, tau: Tensor) -> Tensor:
    """L_cl: the four cross-entropies between images and shuffled reports; local rows against gathered columns.

    `visibility_B` is the positive weight s of each image. Rows without a report take no part, as rows or as columns.
    """
    image = functional.normalize(image_BT.float(), dim=-1)
    text = functional.normalize(text_BT.float(), dim=-1)
    scale_B = visibility_B.float()
    has_text_A = gather_detached(has_text_B)
    num_rows = has_text_A.sum().clamp_min(1)
    own_B = local_rows(len(image), image.device)
    share_B = has_text_B.float()
    # Class weights belong to the diagonal's class, which is the row itself; they normalise the mean over all ranks' rows.
    class_weight_B = share_B * scale_B.detach()
    class_weight_sum = sum_over_ranks(class_weight_B.sum()).clamp_min(1e-8)
    total = image.new_zeros(())
    for rows_BT, columns in ((image, text), (text, image)):
        logits_BA = tau.float() * rows_BT @ gather_with_gradient(columns).T
        plain_B = _row_cross_entropy(logits_BA, own_B, has_text_A)
        scaled_B = _row_cross_entropy(scale_B[:, None] * logits_BA, own_B, has_text_A)
        total = total + (share_B * scaled_B).sum() / num_rows + (class_weight_B * plain_B).sum() / class_weight_sum
    return world_size() * total / 4


def _row_cross_entropy(logits_BA: Tensor, target_B: Tensor, column_A: Tensor) -> Tensor:
    diagonal_B = logits_BA.gather(1, target_B[:, None])[:, 0]
    return logits_BA.masked_fill(~column_A, _EXCLUDED).logsumexp(1) - diagonal_B


def anatomy_reconstruction(restored_BIQ: Tensor, parent_BIQ: Tensor) -> Tensor:
    """L_ar: squared error between the pixels of inner nodes restored from masked children and those of the (detached) unmasked parents."""
    return (restored_BIQ.float() - parent_BIQ.detach().float()).square().mean()


def anatomical_consistency(
    leaves_BMD: Tensor,
    text_BT: Tensor,
    has_text_B: Tensor,
    tau: Tensor,
    share: float = 0.1,
    soft_target: str = "official",
    target_tau: float | None = None,
) -> Tensor:
    """L_ac: a leaf of one image is to find its namesake among the leaves of every other image.

    With S_ab = tau * leaf_a leaf_b^T [M, M] and s_ab the softmax over images b of the text similarity:

    - "official": rows softmax over the leaves of b; target (1 - share) I + share * s_ab on every column, as released.
    - "identity": the same with target I.
    - "across_samples": rows softmax over the leaves of all images together; the target of leaf i of image a is leaf i of the images b,
      with mass (1 - share) on a itself and share * s_ab spread by text similarity: text softens the target across samples.

    Images without a report keep the unsoftened target and get no share of the others'. Gathered images are detached.
    """
    leaves = functional.normalize(leaves_BMD.float(), dim=-1)
    others_AMD = gather_detached(leaves)
    tau = tau.float()
    soft_BA = _text_similarity(text_BT, has_text_B, tau.detach() if target_tau is None else tau.new_tensor(target_tau))
    if soft_target == "identity":
        soft_BA = torch.zeros_like(soft_BA)
        share = 0.0
    if soft_target == "across_samples":
        return _consistency_across_samples(leaves, others_AMD, soft_BA, has_text_B, tau, share)
    num_leaves = leaves.shape[1]
    per_chunk = max(1, _PAIRS_PER_CHUNK // max(1, len(leaves) * num_leaves**2))
    total = leaves.new_zeros(())
    for start in range(0, len(others_AMD), per_chunk):
        chunk = (others_AMD[start : start + per_chunk], soft_BA[:, start : start + per_chunk])
        if len(others_AMD) <= per_chunk:
            total = total + _consistency(leaves, *chunk, tau, share)
        else:
            # Recomputed in the backward pass: the similarities of one chunk are all that is ever held.
            total = total + checkpoint(_consistency, leaves, *chunk, tau, share, use_reentrant=False)
    return -total / (len(leaves) * len(others_AMD) * num_leaves)


def _consistency(leaves_BMD: Tensor, others_CMD: Tensor, soft_BC: Tensor, tau: Tensor, share: float) -> Tensor:
    similarity_BCMM = tau * torch.einsum("bmd,cnd->bcmn", leaves_BMD, others_CMD)
    log_norm_BCM = similarity_BCMM.logsumexp(-1)
    own = similarity_BCMM.diagonal(dim1=-2, dim2=-1) - log_norm_BCM
    every = similarity_BCMM.sum(-1) - similarity_BCMM.shape[-1] * log_norm_BCM
    return (1 - share) * own.sum() + share * (soft_BC[..., None] * every).sum()


def _consistency_across_samples(leaves: Tensor, others: Tensor, soft_BA: Tensor, has_text_B: Tensor, tau: Tensor, share: float) -> Tensor:
    num_leaves = leaves.shape[1]
    similarity_BMAM = tau * torch.einsum("bmd,and->bman", leaves, others)
    log_norm_BM = similarity_BMAM.flatten(2).logsumexp(-1)
    same_BMA = torch.einsum("bmd,amd->bma", leaves, others) * tau
    target_BA = share * soft_BA
    own = torch.where(has_text_B, 1 - share, 1.0)
    target_BA = target_BA.scatter_add(1, local_rows(len(leaves), leaves.device)[:, None], own[:, None].to(target_BA.dtype))
    return -(target_BA[:, None] * (same_BMA - log_norm_BM[..., None])).sum() / (len(leaves) * num_leaves)


@torch.no_grad()
def _text_similarity(text_BT: Tensor, has_text_B: Tensor, tau: Tensor) -> Tensor:
    """s_ab [B, A]: softmax over images with a report; zero rows and columns for those without."""
    text = functional.normalize(text_BT.float(), dim=-1)
    has_text_A = gather_detached(has_text_B)
    logits_BA = (tau * text @ gather_detached(text).T).masked_fill(~has_text_A, _EXCLUDED)
    return logits_BA.softmax(1) * has_text_B[:, None] * has_text_A


def language_model(logits_RV: Tensor, target_R: Tensor, global_mean: bool) -> Tensor:
    """L_lm: cross-entropy of the report tokens; a zero connected to the graph when there are none.

    `global_mean`: token sums are divided by the token count of all ranks (`paper`), else by this rank's (`official`).
    """
    total = functional.cross_entropy(logits_RV.float(), target_R, reduction="sum")
    count = torch.tensor(float(len(target_R)), device=total.device)
    if not global_mean:
        return total / count.clamp_min(1)
    return total * world_size() / sum_over_ranks(count).clamp_min(1)
