"""Grounding losses (METHOD section 8): what ties each anatomy query's attention to its anatomy, without a label of any image.

Shape letters: B rows, G = 32 nodes, M = 25 leaves, N patches, V visible patches, S sentences, F = 14 findings, D width of the
common space. Coordinates: x right, y down, the square image is [-1, 1]^2, so lengths are half-widths.
"""
# ruff: noqa: N815 (fields carry shape letters)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from ssacl.anatomy import INNER_NODES, LEAF_INDEX, LEAVES, NODE_INDEX, leaves_below
from ssacl.atlas import CHART, OVERLAPS, RELATIONS
from ssacl.config import GroundingConfig
from ssacl.distributed import gather_with_gradient, share_of_global
from ssacl.losses.region_text import entities, image_entities, region_text
from ssacl.losses.registration import SCALES, fit_pose, lay_drawing, principal_scales
from ssacl.losses.warp import patch_centres, warp_maps

SLOT_COSINE = 0.1
"""Cosine between two leaves' maps below which they do not repel each other."""
ORDER_MARGIN = 0.05
"""Half-widths by which an order relation must hold."""
LEVEL_TILT = 0.25
"""Slope (tangent of 14 degrees) that two structures "level with" each other may have: patients are not always upright."""
MEAN_LAYOUT_SCALE = 0.85
"""Size of the chart in an average film: collimation leaves a margin around the thorax."""
MEAN_LAYOUT_SLACK = 0.1
"""Half-widths by which the average patient may differ from that."""
MIN_VISIBLE_MASS = 0.25
"""Share of a leaf's warped attention on visible patches below which equivariance skips it."""
CENTRE_SLACK = 0.02
"""Half-widths by which the middle of the average patient may lie beside the middle of the film: what strays here, strays in every film."""
MIN_DRAWN = 0.3
"""Patches that a node must cover within the film for its drawing to count."""
DISTANCE_ROUNDING = 0.01
"""Half-widths within which distances are rounded off, where a bare one would have a kink."""
_EPS = 1e-8

_LEAF_NODES = [NODE_INDEX[leaf] for leaf in LEAVES]
_INNER = [NODE_INDEX[node] for node in INNER_NODES]


@dataclass(frozen=True)
class GroundingInputs:
    """What the terms read. Fields of a group that is None make its terms a zero that stays connected to the graph."""

    attention_BGN: Tensor
    """Unmasked pass: last block's query-to-patch attention, mean over heads, `NODES` order (need not sum to 1)."""
    grid: int
    """Patches along one side; N = grid^2, row by row."""
    masked_attention_BGV: Tensor | None = None
    """Masked pass on the warped image: the same, over the visible patches."""
    visible_BV: Tensor | None = None
    """int64 patch indices of the visible patches of the masked pass."""
    warp: Tensor | None = None
    """[B, 4] angle (radians), log scale, shift x, shift y (half-widths) from unmasked to masked picture."""
    region_BMD: Tensor | None = None
    """Attention-pooled region features of the leaves in the common space."""
    sentences_SD: Tensor | None = None
    """Sentence embeddings in the common space."""
    sentence_row: Tensor | None = None
    """[S] int64 batch row of each sentence."""
    sentence_leaves: Tensor | None = None
    """[S, M] bool leaves that the sentence speaks of."""
    sentence_finding: Tensor | None = None
    """[S] int64 finding, F for a normal statement."""
    entity_logits_BMF: Tensor | None = None
    image_logits_BF: Tensor | None = None
    """Findings of the whole image; they add the same cross-entropy against "present at some leaf"."""
    entities: Tensor | None = None
    """[B, M, F] `FindingStatus` of each finding at each leaf, from the report."""
    has_text: Tensor | None = None
    """[B] bool rows with a report; None: all. Rows without one say nothing about entities."""


def grounding_losses(config: GroundingConfig, inputs: GroundingInputs) -> dict[str, Tensor]:
    """The unweighted scalar terms, keyed by the names of their weights in `config`.

    A term of weight 0 is absent. A term whose inputs are None, or that nothing in the batch speaks to, is a zero connected to the
    graph, so that every rank has the same graph. Runs in float32 whatever the autocast state. The mean over ranks is the loss of the
    global batch.
    """
    with torch.autocast(inputs.attention_BGN.device.type, enabled=False):
        return _terms(config, inputs)


def _terms(config: GroundingConfig, inputs: GroundingInputs) -> dict[str, Tensor]:
    attention_BGN = _renormalised(inputs.attention_BGN)
    leaf_BMN = attention_BGN[:, _LEAF_NODES]
    points_N2 = patch_centres(inputs.grid, leaf_BMN.device)
    centroid_BM2 = leaf_BMN @ points_N2
    # In every text term, so that the graph is the same on every rank, whatever its rows say and whichever terms are on.
    outputs = (inputs.attention_BGN, inputs.region_BMD, inputs.entity_logits_BMF, inputs.image_logits_BF)
    nothing = torch.stack([output.float().sum() * 0.0 for output in outputs if output is not None]).sum()
    terms: dict[str, Tensor] = {}
    if config.equivariance or config.centroid:
        distances = (nothing, nothing)
        if inputs.masked_attention_BGV is not None and inputs.visible_BV is not None and inputs.warp is not None:
            masked_BMV = inputs.masked_attention_BGV[:, _LEAF_NODES]
            distances = equivariance(leaf_BMN, masked_BMV, inputs.visible_BV, inputs.warp, inputs.grid)
        terms |= {name: value for name, value in zip(("equivariance", "centroid"), distances, strict=True) if getattr(config, name)}
    if config.slots:
        terms["slots"] = slots(leaf_BMN)
    if config.compactness:
        terms["compactness"] = compactness(leaf_BMN, points_N2)
    if config.order:
        terms["order"] = order(centroid_BM2)
    if config.layout_chart:
        terms["layout_chart"] = layout_chart(centroid_BM2)
    if config.pose_range:
        terms["pose_range"] = pose_range(centroid_BM2)
    if config.mean_layout:
        terms["mean_layout"] = mean_layout(centroid_BM2)
    if config.shape:
        terms["shape"] = shape(attention_BGN, centroid_BM2, inputs.grid)
    if config.hierarchy:
        terms["hierarchy"] = hierarchy(attention_BGN)
    if config.region_text:
        terms["region_text"] = nothing
        sentence = (inputs.sentences_SD, inputs.sentence_row, inputs.sentence_leaves, inputs.sentence_finding)
        if inputs.region_BMD is not None and all(tensor is not None for tensor in sentence):
            terms["region_text"] = nothing + region_text(inputs.region_BMD, *sentence)  # type: ignore[arg-type]
    if config.entities:
        terms["entities"] = nothing
        if inputs.entity_logits_BMF is not None and inputs.entities is not None:
            terms["entities"] = nothing + entities(inputs.entity_logits_BMF, inputs.entities, inputs.has_text)
            if inputs.image_logits_BF is not None:
                terms["entities"] = terms["entities"] + image_entities(inputs.image_logits_BF, inputs.entities, inputs.has_text)
    return terms


def equivariance(leaf_BMN: Tensor, masked_BMV: Tensor, visible_BV: Tensor, warp_B4: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """The masked pass' attention follows the warp of its picture, both restricted to the visible patches; means over leaves in sight.

    Leaves with under `MIN_VISIBLE_MASS` of their mass on visible patches (masked away or warped out of the picture) are skipped.

    Returns
    -------
    tuple[Tensor, Tensor]
        KL(warped, detached unmasked attention || masked attention), and the distance of their centroids in half-widths. The first
        hardly pulls once broad maps overlap; the second goes on until they lie on each other.
    """
    with torch.no_grad():
        warped_BMN, _ = warp_maps(leaf_BMN, warp_B4, grid)
        target_BMV = warped_BMN.gather(2, visible_BV[:, None].expand(-1, leaf_BMN.shape[1], -1))
        # Magnifying by e^s spreads each unit of mass over e^2s cells of the resampled map.
        share_BM = target_BMV.sum(-1) * (-2.0 * warp_B4[:, 1:2].float()).exp()
        seen_BM = (share_BM >= MIN_VISIBLE_MASS).float()
        target_BMV = _renormalised(target_BMV)
    masked_BMV = _renormalised(masked_BMV)
    kl_BM = (torch.xlogy(target_BMV, target_BMV) - target_BMV * masked_BMV.clamp_min(_EPS).log()).sum(-1)
    gap_BM2 = (masked_BMV - target_BMV) @ patch_centres(grid, leaf_BMN.device)[visible_BV]
    share = share_of_global(seen_BM.sum().clamp_min(_EPS))
    return (kl_BM * seen_BM).sum() * share, (_rounded(gap_BM2) * seen_BM).sum() * share


def slots(leaf_BMN: Tensor) -> Tensor:
    """Mean over pairs of relu(cos(A_m, A_m') - 0.1); pairs that truly overlap (`atlas.OVERLAPS`) are exempt."""
    unit_BMN = functional.normalize(leaf_BMN, dim=-1, eps=_EPS)
    excess_BMM = functional.relu(unit_BMN @ unit_BMN.transpose(1, 2) - SLOT_COSINE)
    first, second = _repelling_pairs()
    return excess_BMM[:, first, second].mean()


def compactness(leaf_BMN: Tensor, points_N2: Tensor) -> Tensor:
    """Mean over rows and leaves of the attention's variance, sum_p A_mp |p - c_m|^2, in squared half-widths."""
    centroid_BM2 = leaf_BMN @ points_N2
    second_moment_BM = leaf_BMN @ points_N2.square().sum(-1)
    return (second_moment_BM - centroid_BM2.square().sum(-1)).mean()


def order(centroid_BM2: Tensor) -> Tensor:
    """Mean hinge over the atlas' relations; `level_with` allows the slope of a tilted patient (`LEVEL_TILT`)."""
    signed, level = _order_tables()
    device = centroid_BM2.device
    lesser, greater, axis = signed.to(device).unbind(1)
    gap_BR = centroid_BM2[:, greater, axis] - centroid_BM2[:, lesser, axis]
    right, left = level.to(device).unbind(1)
    delta_BR2 = centroid_BM2[:, left] - centroid_BM2[:, right]
    # The slope's run is detached: a pair must come level, not drift apart sideways.
    allowed_BR = ORDER_MARGIN + LEVEL_TILT * delta_BR2[..., 0].abs().detach()
    hinges = (functional.relu(ORDER_MARGIN - gap_BR), functional.relu(delta_BR2[..., 1].abs() - allowed_BR))
    return torch.cat(hinges, dim=1).mean()


def layout_chart(centroid_BM2: Tensor) -> Tensor:
    """Mean residual distance (half-widths) of the least-squares affine fit, chart -> the row's 25 centroids.

    Distances, not squares: a squared residual hardly pulls once it is some centimetres, and at equal steps its maps point worse.
    """
    return _rounded(_chart_residual_maker().to(centroid_BM2.device) @ centroid_BM2).mean()


def pose_range(centroid_BM2: Tensor) -> Tensor:
    """Mean over rows of how far the principal scales of the fitted pose lie outside of `SCALES`.

    An affine map may also flatten or mirror the chart; a patient does neither.
    """
    smaller_B, larger_B = principal_scales(fit_pose(centroid_BM2))
    return (functional.relu(SCALES[0] - smaller_B) + functional.relu(larger_B - SCALES[1])).mean()


def mean_layout(centroid_BM2: Tensor) -> Tensor:
    """The average patient stands in the middle of the film, at 0.85 of the chart's size; the mean is over the batch of all ranks.

    Mean over leaves of relu(distance - 0.1) between the centred batch means and the centred chart, plus relu(distance - 0.02) of the two
    centres. A small batch strays, which pulls its patients to the middle; the centroids' equivariance is stronger.
    """
    mean_M2, chart_M2 = gather_with_gradient(centroid_BM2).mean(0), MEAN_LAYOUT_SCALE * torch.tensor(CHART, device=centroid_BM2.device)
    centre_2, chart_centre_2 = mean_M2.mean(0), chart_M2.mean(0)
    arrangement = functional.relu(_rounded((mean_M2 - centre_2) - (chart_M2 - chart_centre_2)) - MEAN_LAYOUT_SLACK).mean()
    return arrangement + functional.relu(_rounded(centre_2 - chart_centre_2) - CENTRE_SLACK)


def shape(attention_BGN: Tensor, centroid_BM2: Tensor, grid: int) -> Tensor:
    """KL(the atlas' drawing, laid where the leaves' own centroids say || each node's attention); mean over nodes on the film.

    The drawing and its place are detached: the term gives maps their extent and puts every node, inner ones included, where the others
    say that it is.
    """
    with torch.no_grad():
        drawn_BGN = lay_drawing(fit_pose(centroid_BM2), grid)
        on_film_BG = (drawn_BGN.sum(-1) >= MIN_DRAWN).float()
        target_BGN = _renormalised(drawn_BGN + 1e-6)
    kl_BG = (target_BGN * (target_BGN.log() - attention_BGN.clamp_min(_EPS).log())).sum(-1)
    return (kl_BG * on_film_BG).sum() * share_of_global(on_film_BG.sum().clamp_min(1.0))


def hierarchy(attention_BGN: Tensor) -> Tensor:
    """Cross-entropy of each inner node's attention to the detached mean of its leaves' attention."""
    target_BIN = _leaf_means().to(attention_BGN.device) @ attention_BGN[:, _LEAF_NODES].detach()
    return -(target_BIN * attention_BGN[:, _INNER].clamp_min(_EPS).log()).sum(-1).mean()


def _rounded(vectors: Tensor) -> Tensor:
    """Lengths of vectors [..., 2], rounded off near 0."""
    return (vectors.square().sum(-1) + DISTANCE_ROUNDING**2).sqrt() - DISTANCE_ROUNDING


def _renormalised(attention: Tensor) -> Tensor:
    attention = attention.float()
    normalised: Tensor = attention / attention.sum(-1, keepdim=True).clamp_min(_EPS)
    return normalised


@lru_cache(maxsize=1)
def _repelling_pairs() -> tuple[list[int], list[int]]:
    pairs = [(i, j) for i, a in enumerate(LEAVES) for j, b in enumerate(LEAVES) if i < j and frozenset((a, b)) not in OVERLAPS]
    return [i for i, _ in pairs], [j for _, j in pairs]


@lru_cache(maxsize=1)
@torch.inference_mode(False)  # Training may take what inference has cached.
def _order_tables() -> tuple[Tensor, Tensor]:
    """([R, 3] leaf of the lesser coordinate, of the greater, axis; [L, 2] leaves level with each other)."""
    signed, level = [], []
    for relation in RELATIONS:
        first, second = LEAF_INDEX[relation.first], LEAF_INDEX[relation.second]
        if relation.kind == "level_with":
            level.append((first, second))
        elif relation.kind == "medial_of" and relation.second.startswith("right "):
            signed.append((second, first, 0))
        else:
            signed.append((first, second, 1 if relation.kind == "above" else 0))
    return torch.tensor(signed), torch.tensor(level)


@lru_cache(maxsize=1)
@torch.inference_mode(False)  # Training may take what inference has cached.
def _chart_residual_maker() -> Tensor:
    """[M, M] I - H: takes centroids to what no affine map of the chart explains."""
    design_M3 = torch.cat((torch.tensor(CHART, dtype=torch.float64), torch.ones(len(CHART), 1, dtype=torch.float64)), dim=1)
    residual_MM: Tensor = torch.eye(len(CHART), dtype=torch.float64) - design_M3 @ torch.linalg.pinv(design_M3)
    return residual_MM.float()


@lru_cache(maxsize=1)
@torch.inference_mode(False)  # Training may take what inference has cached.
def _leaf_means() -> Tensor:
    """[7, M] averages the leaves below each inner node."""
    rows = [[float(leaf in leaves_below(node)) for leaf in LEAVES] for node in INNER_NODES]
    counts_IM = torch.tensor(rows)
    means_IM: Tensor = counts_IM / counts_IM.sum(1, keepdim=True)
    return means_IM
