"""The findings head: a small convolutional net over the film as the atlas sees it (METHOD section 5).

The leaves' attention says where the patient is. The affine map that takes the atlas' chart onto the leaves' centroids undoes size, shift
and rotation, so that every place of the registered film shows the same anatomy, and a few filters and one weight per place are enough.
Leaves are fixed places there: the reports' words say which finding shows at which leaf, and so the cells of the net learn where.

Shape letters: B images, N patches, M = 25 leaves, F = 14 findings, D vision width, R = `REGISTERED_PX`, C = `CELLS`, K = C * C cells.
"""
# ruff: noqa: N815 (fields carry shape letters)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssacl.anatomy import FINDINGS, LEAVES
from ssacl.losses.region_text import entities
from ssacl.losses.registration import fit_pose, lay_drawing
from ssacl.losses.warp import patch_centres
from ssacl.models.findings import RARE_LOGIT, findings_loss, soft_maximum, soft_maximum_at
from ssacl.models.restoration import LEAF_NODES

REGISTERED_PX = 96
"""Side of the registered film."""
CELLS = REGISTERED_PX // 8
"""Cells of the net along a side of the registered film."""
_CHANNELS = (16, 32, 48)


@dataclass(frozen=True)
class FindingsInputs:
    """What the head reads of an encoded image; nothing of it needs a gradient, so it can be kept."""

    registered_B1RR: Tensor
    """float32, standardised per image, the patient's right on the left."""
    pooled_BD: Tensor
    """[B, 2 D] mean patch and class token of the frozen encoder."""


@dataclass(frozen=True)
class FindingsRead:
    """What the head sees, as float32 logits."""

    image_BF: Tensor
    """Of the whole film, `FINDINGS` order."""
    leaves_BMF: Tensor
    """Of each leaf."""
    cells_BFCC: Tensor
    """Of each cell in the atlas' frame, [-1, 1]^2."""


@dataclass(frozen=True)
class FindingsBatch:
    """Rows of the findings stage whose encoder pass is already done."""

    inputs: FindingsInputs
    labels: Tensor
    """[B, F] int64 FindingStatus."""
    has_labels: Tensor
    """[B] bool."""
    entities: Tensor
    """[B, M, F] int64 FindingStatus of each finding at each leaf, from the report."""
    has_text: Tensor
    """[B] bool."""

    def to(self, device: torch.device | str) -> FindingsBatch:
        """The batch with every tensor on `device`."""
        tensors = {item.name: getattr(self.inputs, item.name).to(device) for item in dataclasses.fields(self.inputs)}
        others = (self.labels, self.has_labels, self.entities, self.has_text)
        return FindingsBatch(FindingsInputs(**tensors), *(tensor.to(device) for tensor in others))

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
    """Which of the 14 findings a film shows, and where: from the registered film and, where `with_pooled`, the encoder's pooled features.

    The film's features are read three times: one weight per place (what is normal there?), a soft maximum over all places (one nodule
    anywhere is a finding), and one over the places of each leaf.
    """

    leaf_cells_MK: Tensor

    def __init__(self, width: int, with_pooled: bool) -> None:
        super().__init__()
        first, second, third = _CHANNELS
        self.features = nn.Sequential(
            *(nn.Conv2d(1, first, 5, 2, 2), nn.GroupNorm(1, first), nn.GELU()),
            *(nn.Conv2d(first, second, 3, 2, 1), nn.GroupNorm(1, second), nn.GELU()),
            *(nn.Conv2d(second, third, 3, 2, 1), nn.GroupNorm(1, third), nn.GELU()),
        )
        self.place = nn.Parameter(torch.zeros(1, third, CELLS, CELLS))
        self.mix = nn.Conv2d(third, third, 1)
        self.anywhere = nn.Conv2d(third, len(FINDINGS), 1)
        self.somewhere = nn.Linear(third * (CELLS // 2) ** 2, len(FINDINGS))
        self.leaf_bias = nn.Parameter(torch.full((len(LEAVES), len(FINDINGS)), RARE_LOGIT))
        nn.init.zeros_(self.somewhere.weight)
        nn.init.constant_(self.somewhere.bias, RARE_LOGIT)
        self.pooled: nn.Sequential | None = None
        if with_pooled:
            linear = nn.Linear(2 * width, len(FINDINGS))
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            self.pooled = nn.Sequential(nn.LayerNorm(2 * width), linear)
        drawn_MK = lay_drawing(torch.eye(2, 3)[None], CELLS)[0, list(LEAF_NODES)]
        self.register_buffer("leaf_cells_MK", drawn_MK / drawn_MK.sum(-1, keepdim=True).clamp_min(1e-6), persistent=False)

    def forward(self, inputs: FindingsInputs) -> FindingsRead:
        """Logits of the films, their leaves and their cells."""
        features = self.features(inputs.registered_B1RR.to(self.place.dtype))
        cells_BFCC = self.anywhere(functional.gelu(self.mix(features + self.place))).float()
        cells_BKF = cells_BFCC.flatten(2).transpose(1, 2)
        image_BF = soft_maximum(cells_BKF) + self.somewhere(functional.avg_pool2d(features, 2).flatten(1)).float()
        if self.pooled is not None:
            image_BF = image_BF + self.pooled(inputs.pooled_BD.to(self.place.dtype)).float()
        leaves_BMF = soft_maximum_at(cells_BKF, self.leaf_cells_MK) + self.leaf_bias.float()
        return FindingsRead(image_BF, leaves_BMF, cells_BFCC + self.leaf_bias.float().mean(0)[:, None, None])


def head_loss(read: FindingsRead, labels: Tensor, has_labels: Tensor, status_BMF: Tensor, has_text: Tensor, uncertain: str) -> Tensor:
    """Cross-entropy of the films' findings, plus that of the leaves' from the reports' words; zeros where a batch has neither.

    Arguments as in `findings_loss` and `region_text.entities`.
    """
    return findings_loss(read.image_BF, labels, has_labels, uncertain) + entities(read.leaves_BMF, status_BMF, has_text)
