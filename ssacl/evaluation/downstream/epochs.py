"""Training a small task for a number of epochs: the best epoch by validation is kept, and every finished epoch can be gone on from."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssacl.errors import ConfigError, TrainingError
from ssacl.inference.files import write_whole

logger = logging.getLogger(__name__)

_WARM_UP_SHARE = 0.05
_CLIP = 1.0


@dataclass(frozen=True)
class Schedule:
    """How a task is trained."""

    num_epochs: int = 10
    batch_size: int = 32
    """Films between optimizer steps."""
    lr: float = 1e-4
    """Of the encoder, where it is trained."""
    head_lr: float = 1e-3
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        if self.num_epochs < 1 or self.batch_size < 1 or min(self.lr, self.head_lr) <= 0:
            raise ConfigError("At least one epoch, one film a batch and learning rates above 0 are needed.")


@dataclass(frozen=True)
class Fit:
    """What an epoch-wise fit came to; the module holds the weights of the best epoch."""

    best_epoch: int
    """Counted from 1."""
    val_figures: tuple[float | None, ...]
    """By epoch."""


def fit_epochs(
    module: nn.Module,
    groups: list[dict[str, Any]],
    schedule: Schedule,
    steps_per_epoch: int,
    losses: Callable[[int], Iterable[Tensor]],
    judge: Callable[[], float | None],
    state_path: Path,
) -> Fit:
    """Train `module` and leave the weights of its best epoch in it.

    Parameters
    ----------
    groups
        AdamW's parameter groups with `lr`.
    losses
        Epoch (from 0) -> one loss per step, each computed when it is asked for; follows from the epoch alone, so that a run that goes on
        is the run that was not interrupted.
    judge
        A figure on validation films, higher is better; the earliest of equals wins, the last epoch where there is none.
    state_path
        What the next run goes on from.

    Raises
    ------
    TrainingError
        A loss is not finite.
    StorageError
        The disk refuses.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
    num_steps = steps_per_epoch * schedule.num_epochs
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, num_steps))
    first, figures, best = _resumed(state_path, module, optimizer, rate)
    for epoch in range(first, schedule.num_epochs):
        module.train()
        for loss in losses(epoch):
            if not torch.isfinite(loss):
                raise TrainingError(f"The loss of epoch {epoch + 1} is not a finite number. Lower --lr, or check the checkpoint.")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_([each for group in groups for each in group["params"]], _CLIP)
            optimizer.step()
            rate.step()
        module.eval()
        figures.append(judge())
        if best is None or _is_better(figures[-1], figures[best["epoch"]]):
            best = {"epoch": epoch, "state": copy.deepcopy(module.state_dict())}
        state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "rate": rate.state_dict()}
        content = io.BytesIO()
        torch.save(state | {"figures": figures, "best": best}, content)
        write_whole(state_path, content.getvalue())
    assert best is not None
    module.load_state_dict(best["state"])
    module.eval()
    return Fit(best["epoch"] + 1, tuple(figures))


def _is_better(figure: float | None, best: float | None) -> bool:
    """Where validation says nothing, the later epoch is taken."""
    return figure is None or best is None or figure > best


def _rate(step: int, num_steps: int) -> float:
    """Warm-up, then a cosine to 0."""
    warm_up = max(1, round(_WARM_UP_SHARE * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


def _resumed(path: Path, module: nn.Module, optimizer: Any, rate: Any) -> tuple[int, list[float | None], dict[str, Any] | None]:
    if not path.is_file():
        return 0, [], None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        rate.load_state_dict(state["rate"])
        return len(state["figures"]), state["figures"], state["best"]
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{path.name} is damaged; delete it and run the same command again.") from error
