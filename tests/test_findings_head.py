"""The findings head: registration undoes pose, the net learns from it, and the stage encodes each sample once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_set import NUM_SAMPLES, tiny_config, write_training_set

from ssacl.anatomy import LEAVES, FindingStatus
from ssacl.atlas import CHART
from ssacl.data.collate import Collator
from ssacl.data.loader import StreamingLoader
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers
from ssacl.losses.region_text import entities
from ssacl.losses.warp import patch_centres, warp_images
from ssacl.models.findings_head import REGISTERED_PX, FindingsHead, FindingsInputs, head_loss, register
from ssacl.models.ssacl import SSACL
from ssacl.training.frozen import FrozenSamples, freeze_samples

GRID = 24


def attention_at(centroid_BM2: Tensor) -> Tensor:
    """Narrow maps [B, M, N] with their centroids (nearly) at the given places."""
    distance_BMN = torch.cdist(centroid_BM2, patch_centres(GRID).expand(len(centroid_BM2), -1, -1))
    return (-(distance_BMN**2) / 0.005).softmax(-1)


def posed(angle: float, log_scale: float, x: float, y: float) -> tuple[Tensor, Tensor]:
    """A film of one bright square beside the middle, warped, and the chart's places warped alike."""
    film = torch.zeros(1, 3, 96, 96)
    film[:, :, 30:42, 54:66] = 1.0
    warp = torch.tensor([[angle, log_scale, x, y]])
    moved = warp_images(film, warp, torch.zeros(1, dtype=torch.long), black=0.0)
    turn = torch.tensor([[torch.cos(warp[0, 0]), -torch.sin(warp[0, 0])], [torch.sin(warp[0, 0]), torch.cos(warp[0, 0])]])
    places = 0.6 * torch.tensor(CHART) @ turn.T * warp[0, 1].exp() + warp[0, 2:]
    return moved, attention_at(places[None])


def test_the_registered_film_does_not_depend_on_the_pose() -> None:
    still = register(*posed(0.0, 0.0, 0.0, 0.0))
    assert still.shape == (1, 1, REGISTERED_PX, REGISTERED_PX)
    for pose in ((0.2, 0.0, 0.0, 0.0), (0.0, 0.15, 0.1, -0.1), (-0.15, -0.1, 0.12, 0.08)):
        film, attention = posed(*pose)
        overlap = float((register(film, attention) * still).mean())
        assert overlap > 0.85, (pose, overlap)
        assert float((register(film, None) * still).mean()) < overlap - 0.2


def test_a_flat_film_and_attention_without_a_place_stay_finite() -> None:
    flat = register(torch.zeros(2, 3, 96, 96), torch.full((2, 25, GRID * GRID), 1.0 / GRID**2))
    assert bool(flat.isfinite().all())


def test_the_head_learns_what_is_somewhere_and_what_is_anywhere() -> None:
    torch.manual_seed(0)
    head = FindingsHead(8, with_pooled=True)
    films = torch.randn(64, 1, REGISTERED_PX, REGISTERED_PX) * 0.3
    target = torch.zeros(64, 14)
    for row in range(64):
        if row % 2:
            films[row, 0, 70:82, 8:20] += 3.0
            target[row, 0] = 1.0
        if row % 4 > 1:
            at = 8 * (row % 9)
            films[row, 0, at : at + 6, 40:46] -= 4.0
            target[row, 1] = 1.0
    status = torch.full((64, 25, 14), int(FindingStatus.UNMENTIONED))
    # The square lies at the left or the right lower zone, and the words say which.
    right = LEAVES.index("right lower lung zone"), LEAVES.index("left lower lung zone")
    for row in range(1, 64, 2):
        if row % 4 == 3:
            films[row] = films[row].flip(-1)
        status[row, right[row % 4 == 3]] = FindingStatus.ABSENT
        status[row, right[row % 4 == 3], 0] = FindingStatus.PRESENT
        status[row, right[row % 4 != 3]] = FindingStatus.ABSENT
    inputs = FindingsInputs(films, torch.zeros(64, 16))
    yes = torch.ones(64, dtype=torch.bool)
    optimizer = torch.optim.AdamW(head.parameters(), lr=4e-3)
    for _ in range(40):
        loss = head_loss(head(inputs), target.long(), yes, status, yes, "present")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        read = head(inputs)
    assert float(((read.image_BF[:, :2] > 0) == (target[:, :2] > 0.5)).float().mean()) > 0.95
    told = read.leaves_BMF[1::2, right, 0].argmax(1) == (torch.arange(1, 64, 2) % 4 == 3).long()
    assert float(told.float().mean()) > 0.95
    # A cell of the atlas' frame: where the square was, and not on the other side.
    cells = read.cells_BFCC[1::4, 0].sigmoid().mean(0)
    assert float(cells[8:11, 1:3].mean()) > 3 * float(cells[8:11, 9:11].mean())


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[SSACL, StreamingLoader, FrozenSamples]:
    data: Path = write_training_set(tmp_path_factory.mktemp("data"))
    config = tiny_config(data, data.parent / "runs")
    storage = open_storage(str(data))
    tokenizers = Tokenizers.load(storage)
    collator = Collator(config.data, config.model.vision, tokenizers, seed=0, training=False)
    loader = StreamingLoader(
        storage,
        "train",
        collator,
        world_rank=0,
        world_size=1,
        micro_batch_size=4,
        seed=0,
        last_batch="wrap",
        num_threads=0,
        purpose="training",
    )
    torch.manual_seed(0)
    model = SSACL.from_config(config, tokenizers)
    return model, loader, freeze_samples(model, loader, torch.device("cpu"))


def test_every_sample_is_kept_once(frozen: tuple[SSACL, StreamingLoader, FrozenSamples]) -> None:
    _, _, samples = frozen
    assert len(samples) == NUM_SAMPLES["train"]
    assert samples.inputs.registered_B1RR.dtype == torch.float16


def test_batches_are_the_same_however_they_are_spread_and_wherever_they_start(
    frozen: tuple[SSACL, StreamingLoader, FrozenSamples],
) -> None:
    _, _, samples = frozen
    whole = samples.batches(seed=3, micro_batch_size=8, world_rank=0, world_size=1)
    first, second = next(whole), next(whole)
    halves = [next(samples.batches(3, 4, rank, 2)) for rank in (0, 1)]
    for name in ("registered_B1RR", "pooled_BD"):
        torch.testing.assert_close(getattr(first.inputs, name), torch.cat([getattr(half.inputs, name) for half in halves]))
    assert torch.equal(first.entities, torch.cat([half.entities for half in halves]))
    resumed = next(samples.batches(3, 8, 0, 1, first=1))
    torch.testing.assert_close(second.inputs.registered_B1RR, resumed.inputs.registered_B1RR, rtol=0, atol=0)
    assert not torch.equal(first.labels, second.labels) or not torch.equal(first.inputs.pooled_BD, second.inputs.pooled_BD)


def test_a_mirrored_film_has_its_leaves_findings_mirrored(frozen: tuple[SSACL, StreamingLoader, FrozenSamples]) -> None:
    _, _, samples = frozen
    # Sided on purpose: the film is bright on its left half, and one leaf speaks of it.
    film = torch.zeros_like(samples.inputs.registered_B1RR)
    film[..., : REGISTERED_PX // 2] = 1.0
    status = torch.zeros_like(samples.entities)
    status[:, LEAVES.index("right apical zone"), 3] = int(FindingStatus.PRESENT)
    sided = replace(samples, inputs=replace(samples.inputs, registered_B1RR=film), entities=status)
    stream = sided.batches(seed=0, micro_batch_size=16, world_rank=0, world_size=1)
    sides = []
    for batch in (next(stream) for _ in range(4)):
        bright_left = batch.inputs.registered_B1RR[..., :40].mean((1, 2, 3)) > batch.inputs.registered_B1RR[..., -40:].mean((1, 2, 3))
        leaf = torch.where(bright_left, LEAVES.index("right apical zone"), LEAVES.index("left apical zone"))
        assert bool((batch.entities[torch.arange(16), leaf, 3] == FindingStatus.PRESENT).all())
        assert int((batch.entities == FindingStatus.PRESENT).sum()) == 16
        sides += bright_left.tolist()
    assert 0.25 < sum(sides) / len(sides) < 0.75


def test_kept_inputs_give_the_loss_of_the_whole_pass(frozen: tuple[SSACL, StreamingLoader, FrozenSamples]) -> None:
    model, loader, _ = frozen
    batch = next(iter(loader))
    model.eval()
    with torch.no_grad():
        nn.init.normal_(model.findings_head.somewhere.weight)
        whole = model(batch, "findings").total
        read = model.findings_read(model.encode(batch.image))
    loss = nn.functional.binary_cross_entropy_with_logits(read.image_BF, (batch.labels == 1).float())
    loss = loss + entities(read.leaves_BMF, batch.entities, batch.has_text)
    torch.testing.assert_close(whole, loss, rtol=1e-5, atol=1e-6)
