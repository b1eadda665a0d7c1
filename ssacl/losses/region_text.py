"""Grounding by words (METHOD section 8): regions beside the sentences that speak of them, and the findings that they show.

Shape letters: B rows, M = 25 leaves, S sentences, E regions that sentences name, F = 14 findings, D width of the common space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssacl.anatomy import FINDING_INDEX, NO_FINDING, FindingStatus
from ssacl.distributed import gather_ragged, share_of_global

REGION_TEMPERATURE = 0.1
POSITIVE_WEIGHT = 4.0
UNMENTIONED_WEIGHT = 0.3
_EPS = 1e-8


def region_text(region_BMD: Tensor, sentences_SD: Tensor, row_S: Tensor, leaves_SM: Tensor, finding_S: Tensor) -> Tensor:
    """Multi-positive InfoNCE between the sentences and the regions that they speak of, over all ranks.

    A region is one (row, leaf, finding) that some sentence names. It is positive for every sentence that names the same leaf with
    the same finding, in whatever row; log-likelihoods are averaged over a sentence's positives, then over sentences, and the same
    from regions to sentences. Sentences that name no leaf are left out. Every rank must call it, also with no sentence (S = 0).
    """
    keep_S = leaves_SM.any(1)
    text_SD = functional.normalize(sentences_SD.float()[keep_S], dim=-1)
    leaves_SM, finding_S, row_S = leaves_SM[keep_S], finding_S[keep_S], row_S[keep_S]
    speaker, leaf = leaves_SM.nonzero(as_tuple=True)
    # Two sentences of one report may name the same region with the same finding: one entry, or it would be counted twice.
    entries_E3 = torch.unique(torch.stack((row_S[speaker], leaf, finding_S[speaker]), dim=1), dim=0)
    row_E, leaf_E, finding_E = entries_E3.unbind(1)
    region_ED = functional.normalize(region_BMD.float()[row_E, leaf_E], dim=-1)
    # This rank's sentences beside the regions of all ranks, and this rank's regions beside the sentences of all ranks.
    every_region_ED, every_text_SD = gather_ragged(region_ED), gather_ragged(text_SD)
    every_leaf_E, every_finding_E = gather_ragged(leaf_E), gather_ragged(finding_E)
    every_leaves_SM, every_finding_S = gather_ragged(leaves_SM), gather_ragged(finding_S)
    to_region = _likelihoods(text_SD @ every_region_ED.T, leaves_SM[:, every_leaf_E] & (finding_S[:, None] == every_finding_E))
    to_text = _likelihoods(region_ED @ every_text_SD.T, every_leaves_SM[:, leaf_E].T & (finding_E[:, None] == every_finding_S))
    nothing = (region_BMD.float().sum() + sentences_SD.float().sum()) * 0.0
    loss: Tensor = nothing
    for likelihood in (to_region, to_text):
        count = torch.tensor(float(len(likelihood)), device=likelihood.device)
        loss = loss - 0.5 * likelihood.sum() * share_of_global(count).nan_to_num(posinf=0.0)
    return loss


def _likelihoods(cosine_RC: Tensor, positive_RC: Tensor) -> Tensor:
    """Mean log-likelihood of each row's positives among all columns."""
    log_RC = (cosine_RC / REGION_TEMPERATURE).log_softmax(1)
    return (log_RC * positive_RC).sum(1) / positive_RC.sum(1)


def entities(logits_BMF: Tensor, status_BMF: Tensor, has_text_B: Tensor | None = None) -> Tensor:
    """Weighted binary cross-entropy of findings at leaves: present x4, leaves that the report does not mention x0.3.

    Uncertain entries are left out: the collator turns them into present or absent where the policy says so. Rows without a report
    are left out.
    """
    target_BMF = (status_BMF == FindingStatus.PRESENT).float()
    weight_BMF = 1.0 + (POSITIVE_WEIGHT - 1.0) * target_BMF
    silent_BM1 = (status_BMF == FindingStatus.UNMENTIONED).all(-1, keepdim=True)
    weight_BMF = torch.where(silent_BM1, UNMENTIONED_WEIGHT, weight_BMF) * (status_BMF != FindingStatus.UNCERTAIN)
    if has_text_B is not None:
        weight_BMF = weight_BMF * has_text_B[:, None, None]
    loss_BMF = functional.binary_cross_entropy_with_logits(logits_BMF.float(), target_BMF, reduction="none")
    return (loss_BMF * weight_BMF).sum() * share_of_global(weight_BMF.sum().clamp_min(_EPS))


def image_entities(logits_BF: Tensor, status_BMF: Tensor, has_text_B: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the findings of whole images, present x4; a finding counts when it is present at some leaf.

    A leaf's attention is vague at first; the image as a whole teaches the patches what a finding looks like before it is known where the
    leaves are. "No Finding" has no leaf and is left out, as are findings that are uncertain everywhere.
    """
    present_BF = (status_BMF == FindingStatus.PRESENT).any(1)
    doubtful_BF = (status_BMF == FindingStatus.UNCERTAIN).any(1) & ~present_BF
    target_BF = present_BF.float()
    weight_BF = (1.0 + (POSITIVE_WEIGHT - 1.0) * target_BF) * ~doubtful_BF
    weight_BF = weight_BF * (torch.arange(weight_BF.shape[1], device=weight_BF.device) != FINDING_INDEX[NO_FINDING])
    if has_text_B is not None:
        weight_BF = weight_BF * has_text_B[:, None]
    loss_BF = functional.binary_cross_entropy_with_logits(logits_BF.float(), target_BF, reduction="none")
    return (loss_BF * weight_BF).sum() * share_of_global(weight_BF.sum().clamp_min(_EPS))
