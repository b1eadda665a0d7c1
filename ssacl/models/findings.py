"""Region features and entity classifier, the findings' loss, and anatomy inference (METHOD sections 5 and 8).

Shape letters: B images, N patches, M leaves, F findings, D vision width, T text width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssacl.anatomy import FINDINGS, LEAVES, NO_FINDING, SIDED_LEAVES, SIDES, FindingStatus, anatomy_groups, leaf_mask
from ssacl.distributed import sum_over_ranks, world_size

RARE_LOGIT = -2.0
"""Start of every finding's logit: findings are rare at a leaf."""
OTHER_SIDE = 0.8
"""Share of the strongest leaf's evidence from which a side counts as showing a finding too: on the phantom's validation films it gives the
sides that the reports state for 90 % of findings (0.5: 87 %)."""
_SHARPNESS = 4.0
"""Patches and leaves are pooled by a soft maximum, log-mean-exp of this sharpness."""


class RegionHead(nn.Module):
    """What the leaves' regions say: features in the text encoder's space, and which finding each patch shows.

    A leaf's features are those of its attention-pooled local patches (METHOD section 8). Its findings are a soft maximum of its patches'
    findings, weighted by its attention: a nodule fills a small part of a zone, and a mean would wash it out.
    """

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, text_width)
        self.patch_norm = nn.LayerNorm(2 * width)
        self.patch_fc = nn.Linear(2 * width, width)
        self.patch_out = nn.Linear(width, len(FINDINGS))
        self.leaf_bias = nn.Parameter(torch.full((len(LEAVES), len(FINDINGS)), RARE_LOGIT))
        self.image_bias = nn.Parameter(torch.full((len(FINDINGS),), RARE_LOGIT))

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] pooled local features -> [..., T]."""
        projected: Tensor = self.fc2(nn.functional.gelu(self.fc1(self.norm(features))))
        return projected

    def patch_findings(self, local_BND: Tensor, patches_BND: Tensor) -> Tensor:
        """[B, N, F] float32 logits: which finding each patch shows, from its middle and last features."""
        features = self.patch_norm(torch.cat([local_BND, patches_BND], -1))
        logits: Tensor = self.patch_out(nn.functional.gelu(self.patch_fc(features))).float()
        return logits

    def entity_logits(self, patch_BNF: Tensor, attention_BMN: Tensor) -> Tensor:
        """[B, M, F]: which finding is present at which leaf. The attention is taken as it is: findings do not move it."""
        return soft_maximum_at(patch_BNF, attention_BMN.detach().float().clamp_min(1e-8)) + self.leaf_bias

    def image_logits(self, patch_BNF: Tensor) -> Tensor:
        """[B, F]: which finding is present anywhere."""
        return soft_maximum(patch_BNF) + self.image_bias


def soft_maximum(logits_BKF: Tensor) -> Tensor:
    """Log-mean-exp over K: between mean and maximum, with a gradient for all."""
    count = torch.tensor(float(logits_BKF.shape[1]), device=logits_BKF.device)
    return ((_SHARPNESS * logits_BKF).logsumexp(1) - count.log()) / _SHARPNESS


def soft_maximum_at(logits_BKF: Tensor, weights_MK: Tensor) -> Tensor:
    """The same over weighted K, for each of M (or [B, M, K]) sets of weights that sum to 1: [B, M, F]."""
    # Safe from overflow: the largest of the image is taken out before the exponential.
    top = logits_BKF.detach().amax(1, keepdim=True)
    pooled: Tensor = (weights_MK @ (_SHARPNESS * (logits_BKF - top)).exp()).clamp_min(1e-12).log() / _SHARPNESS + top
    return pooled


def findings_loss(logits_BF: Tensor, labels_BF: Tensor, has_labels_B: Tensor, uncertain: str) -> Tensor:
    """Binary cross-entropy over the labelled rows; a zero connected to the graph when there are none.

    `uncertain` ("present", "absent", "ignore") is what an uncertain finding counts as; an unmentioned one counts as absent.
    """
    target = labels_BF == FindingStatus.PRESENT
    weight = has_labels_B[:, None].expand_as(target).float()
    doubtful = labels_BF == FindingStatus.UNCERTAIN
    if uncertain == "present":
        target = target | doubtful
    elif uncertain == "ignore":
        weight = weight * ~doubtful
    loss = nn.functional.binary_cross_entropy_with_logits(logits_BF.float(), target.float(), reduction="none")
    return (loss * weight).sum() * world_size() / sum_over_ranks(weight.sum()).clamp_min(1)


def infer_sides(leaf_logits_MF: Tensor) -> dict[str, tuple[bool, bool]]:
    """Finding -> is it on the patient's right, on the left, from one film's logits at the leaves.

    The side with the stronger evidence has it, the other one too where its evidence is at least `OTHER_SIDE` of that; neither where the
    strongest leaf is in the middle.
    """
    shown_MF = leaf_logits_MF.float().sigmoid().cpu()
    right_F, left_F = (shown_MF[list(SIDED_LEAVES[side])].amax(0) for side in SIDES)
    top_F = shown_MF.amax(0)
    return {
        name: (bool(right >= OTHER_SIDE * top), bool(left >= OTHER_SIDE * top))
        for name, right, left, top in zip(FINDINGS, right_F.tolist(), left_F.tolist(), top_F.tolist(), strict=True)
        if name != NO_FINDING
    }


def infer_anatomy(probabilities_F: Tensor, thresholds: Mapping[str, float]) -> tuple[list[str], tuple[str, ...], list[bool]]:
    """Entities, anatomy groups and leaf mask of one image from its findings' probabilities.

    A finding is present when its probability reaches its threshold (0.5 where none was chosen). None present, or "No Finding" alone:
    entities ["No Finding"], no groups, every leaf.
    """
    probabilities = probabilities_F.tolist()
    present = [
        name for name, value in zip(FINDINGS, probabilities, strict=True) if name != NO_FINDING and value >= thresholds.get(name, 0.5)
    ]
    groups = anatomy_groups(present)
    return present or [NO_FINDING], groups, leaf_mask(groups)
