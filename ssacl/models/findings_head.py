"""The findings head: a small convolutional net over the film as the atlas sees it (METHOD section 5).

The leaves' attention says where the patient is. The affine map that takes the atlas' chart onto the leaves' centroids undoes size, shift
and rotation, so that every place of the registered film shows the same anatomy, and a few filters and one weight per place are enough.

Shape letters: B images, N patches, M = 25 leaves, F = 14 findings, D vision width, R = `REGISTERED_PX`.
"""
# ruff: noqa: N815 (fields carry shape letters)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssacl.anatomy import FINDINGS
from ssacl.losses.registration import fit_pose
from ssacl.losses.warp import patch_centres
from ssacl.models.findings import RARE_LOGIT, soft_maximum

REGISTERED_PX = 96
"""Side of the registered film."""
_CHANNELS = (16, 32, 48)


@dataclass(frozen=True)
class FindingsInputs:
    """What the head reads of an encoded image; nothing of it needs a gradient, so it can be kept."""

    registered_B1RR: Tensor
    """float32, standardised per image, the patient's right on the left."""
    pooled_BD: Tensor
    """[B, 2 D] mean patch and class token of the frozen encoder."""
    entities_BF: Tensor
    """float32 soft maximum over the leaves of the entity logits."""


@dataclass(frozen=True)
class FindingsBatch:
    """Rows of the findings stage whose encoder pass is already done."""

    inputs: FindingsInputs
    labels: Tensor
    """[B, F] int64 FindingStatus."""
    has_labels: Tensor
    """[B] bool."""

    def to(self, device: torch.device | str) -> FindingsBatch:
        """The batch with every tensor on `device`."""
        tensors = {item.name: getattr(self.inputs, item.name).to(device) for item in dataclasses.fields(self.inputs)}
        return FindingsBatch(FindingsInputs(**tensors), self.labels.to(device), self.has_labels.to(device))

    def __len__(self) -> int:
        return int(self.labels.shape[0])


def register(image_BCHW: Tensor, leaf_attention_BMN: Tensor | None) -> Tensor:
    """The first channel of the images in the atlas' frame: [B, 1, R, R] float32, mean 0 and deviation 1 per image.

    `leaf_attention_BMN` sums to 1 over the patches. None leaves the frame as it is: without grounding, centroids mean nothing.
    """
    grey = image_BCHW[:, :1].float()
    grey = (grey - grey.mean((2, 3), keepdim=True)) / grey.std((2, 3), keepdim=True).clamp_min(1e-3)
    size = (len(grey), 1, REGISTERED_PX, REGISTERED_PX)
    if leaf_attention_BMN is None:
        theta = torch.eye(2, 3, device=grey.device).expand(len(grey), 2, 3)
    else:
        grid = round(leaf_attention_BMN.shape[-1] ** 0.5)
        theta = fit_pose(leaf_attention_BMN.float() @ patch_centres(grid, grey.device))
    return sample(grey, theta, size)


def sample(image_B1HW: Tensor, theta_B23: Tensor, size: tuple[int, int, int, int] | None = None) -> Tensor:
    """Affine sampling with the border repeated; `theta` takes output places to input places, half-widths."""
    grid = functional.affine_grid(theta_B23, list(size or image_B1HW.shape), align_corners=False)
    return functional.grid_sample(image_B1HW, grid, padding_mode="border", align_corners=False)


class FindingsHead(nn.Module):
    """Logits of the 14 findings: from the registered film, the encoder's pooled features and the leaves' entity logits.

    The film's features are read twice: one weight per place (what is normal there?), and a soft maximum over the places, because one
    nodule anywhere is a finding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = _CHANNELS
        self.features = nn.Sequential(
            *(nn.Conv2d(1, first, 5, 2, 2), nn.GroupNorm(1, first), nn.GELU()),
            *(nn.Conv2d(first, second, 3, 2, 1), nn.GroupNorm(1, second), nn.GELU()),
            *(nn.Conv2d(second, third, 3, 2, 1), nn.GroupNorm(1, third), nn.GELU()),
        )
        cells = REGISTERED_PX // 8
        self.place = nn.Parameter(torch.zeros(1, third, cells, cells))
        self.mix = nn.Conv2d(third, third, 1)
        self.anywhere = nn.Conv2d(third, len(FINDINGS), 1)
        self.somewhere = nn.Linear(third * (cells // 2) ** 2, len(FINDINGS))
        self.pooled_norm = nn.LayerNorm(2 * width)
        self.pooled = nn.Linear(2 * width, len(FINDINGS))
        self.entity_gain = nn.Parameter(torch.zeros(len(FINDINGS)))
        for linear in (self.somewhere, self.pooled):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.somewhere.bias, RARE_LOGIT)

    def forward(self, inputs: FindingsInputs) -> Tensor:
        """Logits [B, F] in float32, `FINDINGS` order."""
        features = self.features(inputs.registered_B1RR.to(self.place.dtype))
        anywhere_BFK = self.anywhere(functional.gelu(self.mix(features + self.place))).flatten(2)
        logits: Tensor = (
            soft_maximum(anywhere_BFK.transpose(1, 2).float())
            + self.somewhere(functional.avg_pool2d(features, 2).flatten(1)).float()
            + self.pooled(self.pooled_norm(inputs.pooled_BD.to(self.place.dtype))).float()
            + self.entity_gain.float() * inputs.entities_BF.float().clamp(-15, 15)
        )
        return logits
