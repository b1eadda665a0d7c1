"""Grounding losses: each term against a hand-computed or slow reference, the warp against a picture, and the sum as a whole."""

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from ssacl.anatomy import INNER_NODES, LEAF_INDEX, LEAVES, NODE_INDEX, leaves_below
from ssacl.atlas import CHART, OVERLAPS
from ssacl.config import GroundingConfig
from ssacl.losses import grounding as g
from ssacl.losses import registration
from ssacl.losses.grounding import GroundingInputs, grounding_losses
from ssacl.losses.registration import fit_pose, lay_drawing
from ssacl.losses.warp import BLACK, patch_centres, warp_images, warp_maps

GRID = 12
LEAF_NODES = [NODE_INDEX[leaf] for leaf in LEAVES]
TERMS = {
    *("equivariance", "centroid", "slots", "compactness", "order", "layout_chart", "pose_range", "mean_layout", "shape", "hierarchy"),
    *("region_text", "entities"),
}
ALL = GroundingConfig(compactness=0.6)


def _blob(x: float, y: float, side: int, sigma: float = 0.12) -> Tensor:
    points = patch_centres(side)
    return torch.exp(-(points - torch.tensor([x, y])).square().sum(-1) / (2 * sigma**2)).view(side, side)


def _centroid(picture: Tensor) -> Tensor:
    return picture.flatten() @ patch_centres(picture.shape[-1]) / picture.sum()


def _inputs(batch: int = 3, seed: int = 0, num_sentences: int = 6) -> GroundingInputs:
    rng = torch.Generator().manual_seed(seed)
    num_visible = GRID**2 // 2
    leaves = torch.rand(num_sentences, 25, generator=rng) < 0.1
    leaves[1:, 3] = True
    leaves[0] = False
    return GroundingInputs(
        attention_BGN=torch.rand(batch, 32, GRID**2, generator=rng).requires_grad_(),
        grid=GRID,
        masked_attention_BGV=torch.rand(batch, 32, num_visible, generator=rng).requires_grad_(),
        visible_BV=torch.rand(batch, GRID**2, generator=rng).argsort(1)[:, :num_visible],
        warp=(torch.rand(batch, 4, generator=rng) - 0.5) * 0.4,
        region_BMD=torch.randn(batch, 25, 16, generator=rng).requires_grad_(),
        sentences_SD=torch.randn(num_sentences, 16, generator=rng).requires_grad_(),
        sentence_row=torch.arange(num_sentences) % batch,
        sentence_leaves=leaves,
        sentence_finding=torch.randint(0, 3, (num_sentences,), generator=rng),
        entity_logits_BMF=torch.randn(batch, 25, 14, generator=rng).requires_grad_(),
        entities=torch.randint(0, 4, (batch, 25, 14), generator=rng),
        has_text=torch.arange(batch) != 1,
    )


# --- warp ---


@pytest.mark.parametrize("warp", [(0.0, 0.0, 0.0, 0.0), (0.26, 0.2, 0.2, -0.1), (-0.2, -0.25, -0.25, 0.3), (0.0, 0.0, 0.3, 0.0)])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_picture_and_map_of_a_blob_move_together(warp: tuple[float, ...], padding: int) -> None:
    x, y, size, patch = 0.2, -0.3, 96, 8
    warp_14 = torch.tensor([warp])
    picture = _blob(x, y, size)[None, None]
    moved = warp_images(picture, warp_14, torch.tensor([padding]), black=0.0)
    # Reflection shows the blob a second time, outside the old frame.
    moved = moved * warp_maps(picture.flatten(2), warp_14, size)[1].view(1, 1, size, size)
    angle, scale = warp[0], math.exp(warp[1])
    expected = torch.tensor(
        [scale * (x * math.cos(angle) - y * math.sin(angle)) + warp[2], scale * (x * math.sin(angle) + y * math.cos(angle)) + warp[3]]
    )
    assert torch.allclose(_centroid(moved[0, 0]), expected, atol=0.005)
    pooled = torch.nn.functional.avg_pool2d(picture, patch).view(1, 1, -1)
    moved_map, inside = warp_maps(pooled, warp_14, size // patch)
    pooled_after = torch.nn.functional.avg_pool2d(moved, patch).view(1, 1, -1)
    assert torch.allclose(_centroid(moved_map.view(12, 12)), expected, atol=0.01)
    # Bilinear resampling of 8-px cells blunts a blob of 6 px standard deviation, so the values agree in shape, not to the digit.
    assert torch.corrcoef(torch.stack((moved_map[0, 0], pooled_after[0, 0])))[0, 1] > 0.97
    assert not moved_map[0, 0][~inside[0]].any()
    assert moved_map.sum() == pytest.approx(pooled.sum().item() * scale**2, rel=0.12)


def test_identity_warp_is_exact() -> None:
    image = torch.rand(2, 3, 24, 24)
    assert torch.allclose(warp_images(image, torch.zeros(2, 4), torch.tensor([0, 2])), image, atol=1e-5)
    maps = torch.rand(2, 5, 36)
    moved, inside = warp_maps(maps, torch.zeros(2, 4), 6)
    assert torch.allclose(moved, maps, atol=1e-5)
    assert inside.all()


def test_padding_is_black_border_or_mirror_per_row() -> None:
    image = torch.arange(8.0).expand(1, 1, 8, 8).repeat(3, 1, 1, 1)
    warp = torch.tensor([[0.0, 0.0, 0.5, 0.0]]).repeat(3, 1)  # two pixels to the right
    moved = warp_images(image, warp, torch.tensor([0, 1, 2]))[:, 0, 3]
    assert torch.allclose(moved[:, 2:], torch.arange(6.0).expand(3, 6), atol=1e-5)
    assert torch.allclose(moved[0, :2], torch.full((2,), BLACK))
    assert torch.allclose(moved[1, :2], torch.zeros(2), atol=1e-5)
    assert torch.allclose(moved[2, :2], torch.tensor([1.0, 0.0]), atol=1e-5)
    assert pytest.approx((0 - 0.4978) / 0.2449) == BLACK
    _, inside = warp_maps(torch.ones(1, 1, 64), warp[:1], 8)
    assert inside.view(8, 8)[0].tolist() == [False] * 2 + [True] * 6


# --- single terms ---


def test_equivariance_is_zero_when_the_masked_pass_follows_and_grows_when_it_does_not() -> None:
    leaf = torch.stack([_blob(x * 0.5, y * 0.5, GRID).flatten() for x, y in CHART])[None]
    leaf = leaf / leaf.sum(-1, keepdim=True)
    warp = torch.tensor([[0.2, 0.1, 0.15, -0.1]])
    visible = torch.randperm(GRID**2, generator=torch.Generator().manual_seed(1))[None, :72]
    moved, _ = warp_maps(leaf, warp, GRID)
    following = moved.gather(2, visible[:, None].expand(-1, 25, -1))
    staying = leaf.gather(2, visible[:, None].expand(-1, 25, -1))
    kl, distance = g.equivariance(leaf, following, visible, warp, GRID)
    assert kl.item() == pytest.approx(0.0, abs=1e-5)
    assert distance.item() == pytest.approx(0.0, abs=1e-5)
    kl, distance = g.equivariance(leaf, staying, visible, warp, GRID)
    assert kl.item() > 0.3
    # The shift is 0.18 half-widths long; turning and growing move the outer leaves further.
    assert 0.1 < distance.item() < 0.4


def test_equivariance_equals_a_slow_reference_and_skips_hidden_leaves() -> None:
    batch = _inputs()
    assert batch.masked_attention_BGV is not None
    assert batch.visible_BV is not None
    assert batch.warp is not None
    leaf = batch.attention_BGN.detach()[:, LEAF_NODES].clone()
    leaf[0, 4] = 0.0
    hidden = next(p for p in range(GRID**2) if p not in batch.visible_BV[0])
    leaf[0, 4, hidden] = 1.0
    warp = batch.warp * torch.tensor([0.0, 1.0, 1.0, 1.0])
    warp[0] = 0.0
    leaf = leaf / leaf.sum(-1, keepdim=True)
    masked = batch.masked_attention_BGV.detach()[:, LEAF_NODES]
    moved, _ = warp_maps(leaf, warp, GRID)
    values, gaps = [], []
    for b in range(3):
        for m in range(25):
            target = moved[b, m][batch.visible_BV[b]]
            if target.sum() / math.exp(2 * warp[b, 1]) < 0.25:
                assert (b, m) == (0, 4)
                continue
            target, guess = target / target.sum(), masked[b, m] / masked[b, m].sum()
            values.append(sum(t * math.log(t / q) for t, q in zip(target.tolist(), guess.tolist(), strict=True) if t > 0))
            gap = (guess - target) @ patch_centres(GRID)[batch.visible_BV[b]]
            gaps.append(math.hypot(*gap.tolist(), 0.01) - 0.01)
    assert len(values) == 74
    kl, distance = g.equivariance(leaf, masked, batch.visible_BV, warp, GRID)
    assert kl.item() == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert distance.item() == pytest.approx(sum(gaps) / len(gaps), rel=1e-3)


def test_equivariance_moves_only_the_masked_pass() -> None:
    batch = _inputs()
    loss = grounding_losses(GroundingConfig(), batch)["equivariance"]
    free, masked = torch.autograd.grad(loss, [batch.attention_BGN, batch.masked_attention_BGV], allow_unused=True)
    assert free is None or not free.any()
    assert masked.any()


def test_slots_by_hand() -> None:
    leaf = torch.eye(25, 36)[None]
    assert g.slots(leaf).item() == 0.0
    same = leaf.clone()
    first, second = LEAF_INDEX["right apical zone"], LEAF_INDEX["left apical zone"]
    same[0, second] = same[0, first]
    num_pairs = 25 * 24 // 2 - len(OVERLAPS)
    assert g.slots(same).item() == pytest.approx(0.9 / num_pairs)
    exempt = leaf.clone()
    exempt[0, LEAF_INDEX["carina"]] = exempt[0, LEAF_INDEX["trachea"]]
    assert g.slots(exempt).item() == 0.0


def test_compactness_by_hand() -> None:
    points = patch_centres(2)
    ends = torch.zeros(1, 25, 4)
    ends[..., 0] = ends[..., 1] = 0.5  # x at -0.5 and 0.5, same row
    assert g.compactness(ends, points).item() == pytest.approx(0.25)
    assert g.compactness(torch.eye(4)[:1].expand(1, 25, 4), points).item() == pytest.approx(0.0)


def test_order_vanishes_on_the_chart_and_not_on_its_mirror_images() -> None:
    chart = torch.tensor(CHART)[None] * 0.85
    assert g.order(chart).item() < 1e-4
    assert g.order(chart * torch.tensor([-1.0, 1.0])).item() > 0.1
    assert g.order(chart * torch.tensor([1.0, -1.0])).item() > 0.1
    assert g.order(chart.roll(1, dims=1)).item() > 0.02


@pytest.mark.parametrize("degrees", [-14.0, 14.0])
def test_order_tolerates_the_pose_of_a_tilted_patient(degrees: float) -> None:
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    assert g.order(torch.tensor(CHART)[None] @ turn.T * 0.7 + 0.2).item() < 0.003


def test_layout_chart_ignores_affine_maps_only() -> None:
    chart = torch.tensor(CHART)[None]
    affine = chart @ torch.tensor([[0.6, 0.2], [-0.1, 0.8]]) + torch.tensor([0.1, -0.2])
    assert g.layout_chart(affine).item() == pytest.approx(0.0, abs=1e-6)
    noise = torch.randn(2, 25, 2, generator=torch.Generator().manual_seed(3)) * 0.1
    design = torch.cat((chart[0], torch.ones(25, 1)), 1)
    residual = torch.stack([row - design @ torch.linalg.lstsq(design, row).solution for row in noise])
    distance = (residual.square().sum(-1) + 1e-4).sqrt() - 0.01
    assert g.layout_chart(affine + noise).item() == pytest.approx(distance.mean().item(), rel=1e-4)
    assert g.layout_chart(affine + noise).item() == pytest.approx(residual.norm(dim=-1).mean().item(), abs=0.01)


def test_pose_range_refuses_flat_and_mirrored_charts_only() -> None:
    chart = torch.tensor(CHART)[None]
    turn = torch.tensor([[0.95, -0.312], [0.312, 0.95]])
    assert g.pose_range(0.8 * chart @ turn.T + 0.3).item() == pytest.approx(0.0, abs=1e-3)
    assert g.pose_range(chart * torch.tensor([0.8, 0.25])).item() == pytest.approx(0.3, abs=1e-3)
    assert g.pose_range(chart * torch.tensor([1.5, 0.8])).item() == pytest.approx(0.25, abs=1e-3)
    assert g.pose_range(chart * torch.tensor([-0.8, 0.8])).item() == pytest.approx(0.55 + 0.8, abs=1e-3)


def test_mean_layout_by_hand() -> None:
    chart = torch.tensor(CHART) * 0.85
    swing = torch.tensor([0.2, -0.1])
    assert g.mean_layout(torch.stack((chart + swing, chart - swing))).item() == pytest.approx(0.0, abs=1e-6)
    # Distances are rounded off by less than 0.01.
    assert g.mean_layout((chart + torch.tensor([0.3, 0.4]))[None]).item() == pytest.approx(0.5 - 0.02, abs=0.011)
    half = 0.5 * (chart - chart.mean(0)) + chart.mean(0)
    expected = (0.5 * (chart - chart.mean(0)).norm(dim=1) - 0.1).clamp_min(0).mean().item()
    assert g.mean_layout(half[None]).item() == pytest.approx(expected, abs=0.011)


def test_shape_is_least_on_the_drawing_and_moves_no_centroid_by_itself() -> None:
    pose = torch.tensor([[[0.8, 0.05, 0.1], [-0.05, 0.7, -0.05]]])
    drawn = lay_drawing(pose, GRID)
    attention = (drawn / drawn.sum(-1, keepdim=True)).requires_grad_()
    places = torch.tensor(CHART) @ pose[0, :, :2].T + pose[0, :, 2]
    on_it = g.shape(attention, places[None], GRID)
    elsewhere = g.shape(attention, places[None] + 0.3, GRID)
    assert on_it.item() == pytest.approx(0.0, abs=0.01)
    assert elsewhere.item() > 1.0
    assert torch.allclose(fit_pose(places[None]), pose, atol=1e-5)


def test_hierarchy_is_least_when_inner_nodes_attend_as_their_leaves_and_moves_only_them() -> None:
    attention = torch.rand(2, 32, 36, generator=torch.Generator().manual_seed(0)).requires_grad_()
    normal = attention / attention.sum(-1, keepdim=True)
    best = normal.detach().clone()
    for node in INNER_NODES:
        best[:, NODE_INDEX[node]] = best[:, [NODE_INDEX[leaf] for leaf in leaves_below(node)]].mean(1)
    entropy = -(best * best.log()).sum(-1)[:, [NODE_INDEX[node] for node in INNER_NODES]].mean()
    assert g.hierarchy(best).item() == pytest.approx(entropy.item(), rel=1e-5)
    loss = g.hierarchy(normal)
    assert loss > entropy
    (grad,) = torch.autograd.grad(loss, attention)
    assert not grad[:, LEAF_NODES].any()
    assert grad[:, NODE_INDEX["chest"]].any()


# --- the whole ---


def test_every_term_has_its_weight_and_a_zero_weight_leaves_it_out() -> None:
    losses = grounding_losses(ALL, _inputs())
    assert set(losses) == TERMS
    assert set(GroundingConfig.model_fields) == TERMS | {"enabled", "ramp_share"}
    assert all(value.ndim == 0 and value.isfinite() and value > 0 for value in losses.values())
    without = grounding_losses(GroundingConfig(slots=0, entities=0), _inputs())
    assert "centroid" not in grounding_losses(GroundingConfig(centroid=0), _inputs())
    assert set(without) == TERMS - {"slots", "entities", "compactness"}


def test_missing_inputs_give_zeros_in_the_graph() -> None:
    attention = torch.rand(2, 32, GRID**2, requires_grad=True)
    losses = grounding_losses(GroundingConfig(), GroundingInputs(attention, GRID))
    for name in ("equivariance", "centroid", "region_text", "entities"):
        assert losses[name].item() == 0.0
        assert losses[name].requires_grad


def test_gradients_are_finite_at_collapsed_attention_and_under_autocast() -> None:
    attention = torch.zeros(2, 32, GRID**2)
    attention[..., 5] = 1.0
    attention.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = grounding_losses(ALL, GroundingInputs(attention, GRID))
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert attention.grad is not None
    assert attention.grad.isfinite().all()


def test_training_goes_on_from_what_inference_has_cached() -> None:
    for cached in (*vars(g).values(), *vars(registration).values()):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    with torch.inference_mode():
        grounding_losses(ALL, _inputs())
    batch = _inputs()
    sum(grounding_losses(ALL, batch).values()).backward()
    assert batch.attention_BGN.grad.isfinite().all()


def test_geometric_terms_lead_free_attention_to_the_chart() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(1, 32, GRID**2) * 0.1).requires_grad_()
    config = GroundingConfig()
    terms = ("slots", "order", "layout_chart", "pose_range", "mean_layout", "shape", "hierarchy")
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(250):
        losses = grounding_losses(config, GroundingInputs(logits.softmax(-1), GRID))
        optimizer.zero_grad()
        sum(getattr(config, name) * losses[name] for name in terms).backward()
        optimizer.step()
    attention = logits.detach().softmax(-1)[0]
    centroid = attention @ patch_centres(GRID)
    # Up to a pose: the mean layout leaves a patient room.
    pose = fit_pose(centroid[None, LEAF_NODES])[0]
    residual = centroid[LEAF_NODES] - torch.tensor(CHART) @ pose[:, :2].T - pose[:, 2]
    assert residual.norm(dim=-1).max() < 0.12
    assert torch.allclose(pose, torch.tensor([[0.85, 0.0, 0.0], [0.0, 0.85, 0.0]]), atol=0.45)
    assert losses["shape"].item() < 0.5  # uniform: above 3
    # An inner node has come to where its leaves are.
    inner = centroid[NODE_INDEX["left lung"]]
    assert (inner - attention[[NODE_INDEX[leaf] for leaf in leaves_below("left lung")]].mean(0) @ patch_centres(GRID)).norm() < 0.1


def _rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    part = _rows_of(_inputs(batch=4), rank)
    losses = grounding_losses(GroundingConfig(), part)
    sum(losses.values()).backward()
    grads = {name: value.grad for name, value in vars(part).items() if isinstance(value, Tensor) and value.grad is not None}
    torch.save({"losses": {name: value.detach() for name, value in losses.items()}, "grads": grads}, f"{out}{rank}.pt")
    torch.distributed.destroy_process_group()


def _rows_of(whole: GroundingInputs, rank: int) -> GroundingInputs:
    """Two rows of four, and the sentences that are theirs: not as many on each rank."""
    assert whole.sentence_row is not None
    own = whole.sentence_row // 2 == rank
    taken = {}
    for name, value in vars(whole).items():
        if isinstance(value, Tensor):
            part = value[own] if name.startswith("sentence") else value[2 * rank : 2 * rank + 2]
            taken[name] = part.detach().requires_grad_(value.requires_grad)
    taken["sentence_row"] = taken["sentence_row"] - 2 * rank
    return GroundingInputs(**taken, grid=GRID)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path / "store"), str(tmp_path / "rank")), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = _inputs(batch=4)
    losses = grounding_losses(GroundingConfig(), whole)
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert torch.stack([rank["losses"][name] for rank in ranks]).mean().item() == pytest.approx(value.item(), rel=1e-5), name
    for name in ("attention_BGN", "masked_attention_BGV", "entity_logits_BMF", "region_BMD"):
        # Data-parallel training divides summed gradients by the number of ranks.
        shared = torch.cat([rank["grads"][name] for rank in ranks]) / 2
        assert torch.allclose(shared, getattr(whole, name).grad, rtol=1e-4, atol=1e-8), name
    rows = whole.sentence_row // 2
    for rank in (0, 1):
        assert torch.allclose(ranks[rank]["grads"]["sentences_SD"] / 2, whole.sentences_SD.grad[rows == rank], rtol=1e-4, atol=1e-8)
    assert [len(rank["grads"]["sentences_SD"]) for rank in ranks] == [4, 2], "unequal numbers are part of the test"
