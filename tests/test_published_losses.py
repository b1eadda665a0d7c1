"""The five losses as functions: variants, rows without text, chunks; and two ranks against one."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import random_batch, small_config, small_model, take_rows, without_text
from torch import Tensor
from torch.nn import functional

from ssacl.distributed import gather_with_gradient
from ssacl.losses import published

YES = torch.ones(5, dtype=torch.bool)


def features(rows: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@given(st.integers(2, 40), st.floats(0.05, 0.95), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_split_keeps_the_lowest_noise(patches: int, ratio: float, seed: int) -> None:
    noise = torch.rand(3, patches, generator=torch.Generator().manual_seed(seed))
    kept, removed = published.split_patches(noise, ratio)
    assert kept.shape[1] == round(patches * (1 - ratio))
    assert torch.equal(torch.cat([kept, removed], 1).sort(1).values, torch.arange(patches).expand(3, -1))
    if kept.shape[1] and removed.shape[1]:
        assert bool((noise.gather(1, kept).max(1).values <= noise.gather(1, removed).min(1).values).all())


def test_reconstruction_target_normalised_per_patch() -> None:
    target = torch.tensor([[[1.0, 2.0, 3.0], [5.0, 5.0, 8.0]]])
    assert float(published.image_reconstruction(target + 2, target, normalised=False)) == pytest.approx(4.0)
    wanted = torch.tensor([[[-1.0, 0.0, 1.0], [-1.0, -1.0, 2.0]]]) / torch.tensor([1.0, 3.0**0.5])[None, :, None]
    assert float(published.image_reconstruction(wanted, target, normalised=True)) == pytest.approx(0.0, abs=1e-9)


def test_rows_without_text_are_as_if_absent_from_the_contrast() -> None:
    image, text, scale = features(5, 7), features(5, 7, seed=1), features(5, seed=2)
    has_text = torch.tensor([True, False, True, True, False])
    tau = torch.tensor(4.0)
    ours = published.global_contrastive(image, text, functional.softplus(scale), has_text, tau)
    kept = [0, 2, 3]
    alone = published.global_contrastive(image[kept], text[kept], functional.softplus(scale[kept]), YES[:3], tau)
    torch.testing.assert_close(ours, alone)
    ours.backward()
    for tensor in (image, text, scale):
        assert not bool(tensor.grad[~has_text].any())
        assert bool(tensor.grad[has_text].any())


def test_contrast_without_any_text_is_a_connected_zero() -> None:
    image, text = features(3, 7), features(3, 7, seed=1)
    loss = published.global_contrastive(image, text, torch.ones(3), ~YES[:3], torch.tensor(30.0))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert not bool(image.grad.any())
    assert not bool(text.grad.any())


@pytest.mark.parametrize("variant", ["official", "identity", "across_samples"])
def test_consistency_variants_equal_loops(variant: str) -> None:
    leaves, text = features(3, 4, 6), features(3, 5, seed=1)
    has_text, tau, share = torch.tensor([True, True, False]), torch.tensor(2.5), 0.3
    ours = published.anatomical_consistency(leaves, text, has_text, tau, share, variant)
    unit, words = functional.normalize(leaves, dim=-1), functional.normalize(text, dim=-1)
    total = torch.zeros(())
    for a in range(3):
        logits = [tau * unit[a] @ unit[b].detach().T for b in range(3)]
        soft = [torch.zeros(()) for _ in range(3)]
        if a < 2:
            soft = [*(tau * words[:2] @ words[a]).softmax(0).detach(), torch.zeros(())]
        everywhere = torch.cat(logits, 1).log_softmax(1)
        for b in range(3):
            if variant == "across_samples":
                mass = share * soft[b] + (a == b) * (1.0 if a == 2 else 1 - share)
                total = total - mass * everywhere[:, b * 4 : b * 4 + 4].diagonal().mean() * 3
            else:
                target = torch.eye(4) if variant == "identity" else (1 - share) * torch.eye(4) + share * soft[b]
                total = total - (logits[b].log_softmax(1) * target).sum(1).mean()
    torch.testing.assert_close(ours, total / 9)


def test_consistency_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for pairs in (2**22, 1):
        monkeypatch.setattr(published, "_PAIRS_PER_CHUNK", pairs)
        leaves = features(5, 4, 6)
        loss = published.anatomical_consistency(leaves, features(5, 5, seed=1), YES, torch.tensor(2.0))
        loss.backward()
        results.append((loss.detach(), leaves.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("num_ranks", [4, 32])
def test_consistency_holds_no_more_with_more_ranks(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "_PAIRS_PER_CHUNK", 2 * 4 * 5 * 5)
    monkeypatch.setattr(published, "gather_detached", lambda tensor: tensor.detach().repeat(num_ranks, *[1] * (tensor.ndim - 1)))
    held: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.numel()) or tensor, lambda tensor: tensor):
        loss = published.anatomical_consistency(features(4, 5, 6), features(4, 5, seed=1), YES[:4], torch.tensor(2.0))
    assert loss.requires_grad
    # What is gathered is held; similarities [4, 4 * ranks, 5, 5] are not, neither whole nor by chunk.
    assert max(held) <= 4 * num_ranks * 5 * 6
    assert 4 * 2 * 5 * 5 not in held


def test_own_temperature_unties_the_soft_target() -> None:
    leaves, text = features(3, 4, 6), features(3, 5, seed=1)
    arguments = (leaves, text, YES[:3], torch.tensor(2.0), 0.3, "official")
    torch.testing.assert_close(published.anatomical_consistency(*arguments, 2.0), published.anatomical_consistency(*arguments))
    assert abs(float((published.anatomical_consistency(*arguments, 0.1) - published.anatomical_consistency(*arguments)).detach())) > 1e-4


def test_report_loss_without_tokens_is_a_connected_zero() -> None:
    logits = features(0, 11)
    for global_mean in (True, False):
        loss = published.language_model(logits, torch.zeros(0, dtype=torch.int64), global_mean)
        assert float(loss.detach()) == 0.0
        loss.backward()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _config(wiring: str):
    return small_config(model__wiring=wiring, model__vision__decoder_width=24, losses__grounding={"enabled": False})


def _batch(config):
    return replace(without_text(random_batch(8, config, sentences_per_row=0), [1, 6, 7]), has_labels=torch.arange(8) != 5)


def _losses_and_grads(config, batch, stage: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = small_model(config)
    losses = model(batch, stage)
    losses.total.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: value.detach() for name, value in losses.named().items()}, grads


def _rank(rank: int, folder: str, port: int, wiring: str, stages: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {}
    for stage in stages:
        config = _config(wiring)
        losses, grads = _losses_and_grads(config, take_rows(_batch(config), 4 * rank, 4 * rank + 4), stage)
        for tensors in (losses, grads):
            for tensor in tensors.values():
                dist.all_reduce(tensor)
                tensor /= 2
        results[stage] = {"losses": losses, "grads": grads}
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_of_four_equal_one_rank_of_eight(tmp_path: Path) -> None:
    stages = ("joint", "findings")
    torch.multiprocessing.spawn(_rank, (str(tmp_path), _free_port(), "paper", stages), nprocs=2)
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    for stage in stages:
        config = _config("paper")
        losses, grads = _losses_and_grads(config, _batch(config), stage)
        found = results[stage]
        assert losses.keys() == found["losses"].keys()
        for name, value in losses.items():
            assert float(found["losses"][name]) == pytest.approx(float(value), rel=1e-5), name
        assert grads.keys() == found["grads"].keys()
        scale = max(float(grad.abs().max()) for grad in grads.values())
        for name, grad in grads.items():
            assert float((found["grads"][name] - grad).abs().max()) <= 1e-5 * float(grad.abs().max()) + 1e-7 * scale, name


def test_gather_without_a_process_group_is_the_tensor_itself() -> None:
    tensor = features(3, 2)
    assert gather_with_gradient(tensor) is tensor
