"""The findings head: registration undoes pose, the net learns from it, and the stage encodes each sample once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_set import NUM_SAMPLES, tiny_config, write_training_set

from ssacl.atlas import CHART
from ssacl.data.collate import Collator
from ssacl.data.loader import StreamingLoader
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers
from ssacl.losses.warp import patch_centres, warp_images
from ssacl.models.findings_head import REGISTERED_PX, FindingsHead, FindingsInputs, register
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
    head = FindingsHead(8)
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
    inputs = FindingsInputs(films, torch.zeros(64, 16), torch.zeros(64, 14))
    optimizer = torch.optim.AdamW(head.parameters(), lr=4e-3)
    for _ in range(40):
        loss = nn.functional.binary_cross_entropy_with_logits(head(inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (head(inputs)[:, :2] > 0) == (target[:, :2] > 0.5)
    assert float(right.float().mean()) > 0.95


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
    torch.testing.assert_close(first.inputs.registered_B1RR, torch.cat([half.inputs.registered_B1RR for half in halves]))
    resumed = next(samples.batches(3, 8, 0, 1, first=1))
    torch.testing.assert_close(second.inputs.registered_B1RR, resumed.inputs.registered_B1RR, rtol=0, atol=0)
    assert not torch.equal(first.labels, second.labels) or not torch.equal(first.inputs.pooled_BD, second.inputs.pooled_BD)


def test_kept_inputs_give_the_loss_of_the_whole_pass(frozen: tuple[SSACL, StreamingLoader, FrozenSamples]) -> None:
    model, loader, _ = frozen
    batch = next(iter(loader))
    model.eval()
    with torch.no_grad():
        nn.init.normal_(model.findings_head.pooled.weight)
        whole = model(batch, "findings").total
        logits = model.findings_logits(model.encode(batch.image))
    loss = nn.functional.binary_cross_entropy_with_logits(logits, (batch.labels == 1).float())
    torch.testing.assert_close(whole, loss, rtol=1e-5, atol=1e-6)
