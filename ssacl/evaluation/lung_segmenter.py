"""A supervised upper bound for lung maps: a small convolutional net trained on the lung masks of other patients.

It is no part of the method, which sees no mask: it tells what masks would buy.

Shape letters: B films, S side of the net's square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ssacl.data.dicom import read_picture
from ssacl.data.transforms import load_square
from ssacl.evaluation.annotations import Asked, Film, square_target
from ssacl.evaluation.conditions import LOG_SCALE
from ssacl.evaluation.film_answers import Answer, film_pose
from ssacl.evaluation.film_baselines import NUM_FOLDS, deal_folds
from ssacl.evaluation.film_grounding import LUNGS
from ssacl.evaluation.lung_landmarks import lung_landmarks
from ssacl.losses.warp import PADDING_ZEROS, warp_images

SIDE_PX = 64
LANDMARK_PX = 256
_WIDTHS = (12, 24, 48, 64)


class LungNet(nn.Module):
    """[B, 1, S, S] film, 0..1 -> [B, 2, S, S] logits of right and left lung: convolutions down to S/8 and up again, with skips."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, *_WIDTHS)
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(widths, _WIDTHS, strict=False))
        self.up = nn.ModuleList(_block(a + b, b) for a, b in zip(_WIDTHS[:0:-1], _WIDTHS[-2::-1], strict=True))
        self.head = nn.Conv2d(_WIDTHS[0], len(LUNGS), 1)

    def forward(self, image_B1SS: Tensor) -> Tensor:
        """Logits."""
        skips, value = [], image_B1SS - 0.5
        for level, block in enumerate(self.down):
            value = block(value if level == 0 else functional.max_pool2d(value, 2))
            skips.append(value)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            value = block(torch.cat([functional.interpolate(value, scale_factor=2.0, mode="bilinear", align_corners=False), skip], 1))
        logits: Tensor = self.head(value)
        return logits


def segmenter_answers(
    films: Sequence[Film],
    conditions: Sequence[str],
    *,
    num_steps: int = 400,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Mapping[str, list[Answer]]:
    """Answers about the lungs of every film, each by a net that saw masks of other patients only; condition -> answers in order.

    Parameters
    ----------
    num_steps
        Optimizer steps of 16 films for each of the folds, under random poses.
    progress
        Called with 1 after every step.
    """
    squares = np.stack([load_square(read_picture(film.path.read_bytes(), film.path.name).pixels, SIDE_PX)[0] for film in films])
    lungs = {row: masks for row, film in enumerate(films) if (masks := _lung_masks(film)) is not None}
    folds = deal_folds([film.patient for film in films])
    answers: dict[str, list[Answer]] = {name: [Answer({})] * len(films) for name in conditions}
    for fold in range(NUM_FOLDS):
        fit = [row for row in lungs if folds[row] != fold]
        own = [row for row in range(len(films)) if folds[row] == fold]
        if not fit or not own:
            continue
        net = _trained(squares[fit], np.stack([lungs[row] for row in fit]), num_steps, seed + fold, progress)
        for name in conditions:
            moved = np.stack([film_pose(films[row], name).moved_image(squares[row]) for row in own])
            with torch.inference_mode():
                share = net(torch.from_numpy(moved)[:, None]).sigmoid()
            for row, lung_pair in zip(own, share, strict=True):
                answers[name][row] = _answer(lung_pair)
    return answers


def _answer(share_2SS: Tensor) -> Answer:
    fine = functional.interpolate(share_2SS[None], size=(LANDMARK_PX, LANDMARK_PX), mode="bilinear", align_corners=False)[0].numpy()
    right, left = fine >= 0.5
    maps = {Asked("anatomy", lung, lung): each for lung, each in zip(LUNGS, share_2SS.numpy(), strict=True)}
    # A lung that was not found is guessed in the middle: it must not drop out of the mean.
    return Answer(maps, np.nan_to_num(lung_landmarks(right, left)))


def _trained(
    squares: NDArray[np.float32], masks: NDArray[np.float32], num_steps: int, seed: int, progress: Callable[[int], None] | None
) -> LungNet:
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    net = LungNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=num_steps)
    pairs = torch.from_numpy(np.concatenate([squares[:, None], masks], axis=1))
    # Wider than the poses of the conditions, crops included.
    reach = torch.tensor([0.2, 0.2 + LOG_SCALE, 0.35, 0.35])
    for _ in range(num_steps):
        rows = torch.randint(len(pairs), (16,), generator=random)
        warp = (torch.rand(16, 4, generator=random) * 2 - 1) * reach
        warp[:, 1] += 0.1
        moved = warp_images(pairs[rows], warp, torch.full((16,), PADDING_ZEROS), black=0.0)
        gain = 1 + 0.3 * (torch.rand(16, 1, 1, 1, generator=random) * 2 - 1)
        loss = functional.binary_cross_entropy_with_logits(net(moved[:, :1] * gain), moved[:, 1:])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(1)
    return net.eval()


def _block(num_in: int, num_out: int) -> nn.Sequential:
    layers = (nn.Conv2d(num_in, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(num_out, num_out, 3, padding=1, bias=False), nn.BatchNorm2d(num_out), nn.ReLU())


def _lung_masks(film: Film) -> NDArray[np.float32] | None:
    """[2, S, S] right and left lung of a film that has masks of both."""
    masks = {target.asked.group: target for target in film.targets if target.drawn_as == "mask" and target.asked.group in LUNGS}
    if len(masks) < len(LUNGS):
        return None
    return np.stack([square_target(film, masks[lung], SIDE_PX) for lung in LUNGS]).astype(np.float32)
