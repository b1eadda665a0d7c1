"""A small convolutional decoder on patches, frozen or trained with the encoder, and its training on masks.

Shape letters: B films, N = g x g patches, D width, C structures, S image side, n films.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ssacl.evaluation.downstream.epochs import Fit, Schedule, fit_epochs
from ssacl.evaluation.downstream.features import to_images
from ssacl.evaluation.downstream.films import FilmReader, TaskFilm
from ssacl.evaluation.downstream.overlap import THRESHOLDS, dice, dice_at_thresholds
from ssacl.models.ssacl import SSACL
from ssacl.models.vision import patchify

_HIDDEN = 64
_GROUPS = 8


class Patches(nn.Module):
    """What the decoder reads: "frozen" or "full" encoder outputs, or the "raw" pixels of each patch."""

    def __init__(self, model: SSACL, kind: str) -> None:
        super().__init__()
        vision = model.config.vision
        self.kind, self.patch_size_px, self.grid = kind, vision.patch_size_px, vision.grid
        self.width = vision.width if kind != "raw" else 3 * vision.patch_size_px**2
        self.encoder = None if kind == "raw" else copy.deepcopy(model.encoder).requires_grad_(kind == "full")

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, D]."""
        if self.encoder is None:
            return patchify(image_BCHW, self.patch_size_px)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.kind == "full"):
            patches: Tensor = self.encoder(image_BCHW).patches_BVD
        return patches


class MaskNet(nn.Module):
    """Patches -> masks at four times the grid, then at the side of the image."""

    def __init__(self, model: SSACL, kind: str, num_structures: int, seed: int) -> None:
        super().__init__()
        self.patches = Patches(model, kind)
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(self.patches.width)
        self.embed = nn.Conv2d(self.patches.width, _HIDDEN, 1)
        # Raw patches do not say where they lie; encoded ones do.
        self.place = nn.Parameter(torch.zeros(1, _HIDDEN, self.patches.grid, self.patches.grid))
        self.blocks = nn.Sequential(_block(), nn.Upsample(scale_factor=2, mode="bilinear"), _block())
        self.finer = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), _block(), nn.Conv2d(_HIDDEN, num_structures, 1))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, C, S, S] logits."""
        patches_BDN = self.norm(self.patches(image_BCHW)).transpose(1, 2)
        grid = self.patches.grid
        logits = self.finer(self.blocks(self.embed(patches_BDN.unflatten(2, (grid, grid))) + self.place))
        return functional.interpolate(logits, size=image_BCHW.shape[-2:], mode="bilinear", align_corners=False)

    def decoder_parameters(self) -> list[nn.Parameter]:
        """All but the encoder's."""
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("patches.")]


def _block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(_HIDDEN, _HIDDEN, 3, padding=1), nn.GroupNorm(_GROUPS, _HIDDEN), nn.GELU())


class MaskStore:
    """Masks of films, packed in memory: 8 pixels a byte.

    Parameters
    ----------
    make
        Film -> [C, S, S] bool.
    """

    def __init__(self, make: Callable[[TaskFilm], NDArray[np.bool_]]) -> None:
        self._make = make
        self._packed: dict[str, tuple[NDArray[np.uint8], tuple[int, ...]]] = {}

    def masks(self, films: Sequence[TaskFilm]) -> NDArray[np.bool_]:
        """[n, C, S, S]; see `MaskSet.masks` for the errors."""
        found = []
        for film in films:
            if film.id not in self._packed:
                mask = self._make(film)
                self._packed[film.id] = np.packbits(mask), mask.shape
            packed, shape = self._packed[film.id]
            found.append(np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape).astype(bool))
        return np.stack(found)


def train_masks(
    net: MaskNet,
    reader: FilmReader,
    store: MaskStore,
    films: dict[str, Sequence[TaskFilm]],
    known: dict[str, NDArray[np.bool_]],
    size_px: int,
    schedule: Schedule,
    seed: int,
    state_path: Path,
    progress: Callable[[int], None] | None,
) -> Fit:
    """Train on `films["train"]`; the epoch with the best mean Dice on `val`, at the middle threshold, is kept. See `fit_epochs`.

    `known` [n, C] says per split which structures of a film count.
    """
    train, device = list(films["train"]), net.place.device

    def losses(epoch: int) -> Iterator[Tensor]:
        order = np.random.default_rng((seed, epoch)).permutation(len(train))
        start = 0
        for squares in reader.batches([train[row] for row in order], size_px, schedule.batch_size):
            rows = order[start : start + len(squares)]
            start += len(squares)
            truth = torch.from_numpy(store.masks([train[row] for row in rows])).to(device)
            yield _loss(net(to_images(squares, device)), truth.float(), torch.from_numpy(known["train"][rows]).to(device))
            if progress is not None:
                progress(len(squares))

    def judge() -> float | None:
        scores = np.concatenate(
            [
                dice(probability >= THRESHOLDS[len(THRESHOLDS) // 2], truth)
                for _, probability, truth in answers(net, reader, store, films["val"], size_px)
            ]
        )
        return float(scores[known["val"]].mean()) if known["val"].any() else None

    groups = [{"params": net.decoder_parameters(), "lr": schedule.head_lr}]
    if net.patches.kind == "full":
        groups.append({"params": list(net.patches.parameters()), "lr": schedule.lr})
    return fit_epochs(net, groups, schedule, -(-len(train) // schedule.batch_size), losses, judge, state_path)


def answers(
    net: MaskNet, reader: FilmReader, store: MaskStore, films: Sequence[TaskFilm], size_px: int, batch_size: int = 32
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]]:
    """(squares, probabilities, true masks) of the films in order, a batch at a time."""
    start = 0
    for squares in reader.batches(films, size_px, batch_size):
        with torch.inference_mode():
            probability = net(to_images(squares, net.place.device)).sigmoid().float().cpu().numpy()
        yield squares, probability, store.masks(films[start : start + len(squares)])
        start += len(squares)


def scores_of(net: MaskNet, reader: FilmReader, store: MaskStore, films: Sequence[TaskFilm], size_px: int) -> NDArray[np.float64]:
    """[thresholds, n, C] Dice."""
    parts = [dice_at_thresholds(probability, truth) for _, probability, truth in answers(net, reader, store, films, size_px)]
    return np.concatenate(parts, axis=1)


def _loss(logits_BCSS: Tensor, truth_BCSS: Tensor, known_BC: Tensor) -> Tensor:
    """Cross-entropy of the pixels plus 1 - soft Dice, over known structures."""
    share = known_BC.float() / known_BC.sum().clamp_min(1)
    pixels_BC = functional.binary_cross_entropy_with_logits(logits_BCSS.float(), truth_BCSS, reduction="none").mean((2, 3))
    probability = logits_BCSS.float().sigmoid()
    overlap_BC = 2 * (probability * truth_BCSS).sum((2, 3)) + 1
    soft_BC = overlap_BC / (probability.sum((2, 3)) + truth_BCSS.sum((2, 3)) + 1)
    return (share * (pixels_BC + 1 - soft_BC)).sum()
