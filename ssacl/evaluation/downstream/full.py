"""The whole encoder trained on labelled films, with a linear head.

Shape letters: n films, F findings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ssacl.config import AugmentConfig
from ssacl.data.transforms import augment
from ssacl.evaluation.downstream.epochs import Fit, Schedule, fit_epochs
from ssacl.evaluation.downstream.features import FilmEncoder, to_images
from ssacl.evaluation.downstream.films import PRESENT, UNKNOWN, FilmReader, TaskFilm, label_table
from ssacl.evaluation.roc import roc_auc
from ssacl.models.ssacl import SSACL


class FilmClassifier(nn.Module):
    """A copy of the checkpoint's encoder and one linear layer on its pooled features."""

    def __init__(self, model: SSACL, num_findings: int, seed: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(FilmEncoder(model))
        self.norm = nn.LayerNorm(self.encoder.width)
        torch.manual_seed(seed)
        self.head = nn.Linear(self.encoder.width, num_findings)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, F] logits."""
        logits: Tensor = self.head(self.norm(self.encoder(image_BCHW)))
        return logits


@dataclass(frozen=True)
class Trained:
    """A trained classifier's answers."""

    test: NDArray[np.float64]
    """[n, F] logits of the test films, of the best epoch alone."""
    fit: Fit


def train_full(
    model: SSACL,
    reader: FilmReader,
    splits: Mapping[str, Sequence[TaskFilm]],
    schedule: Schedule,
    augmentation: AugmentConfig,
    seed: int,
    state_path: Path,
    progress: Callable[[int], None] | None = None,
) -> Trained:
    """Train on `splits["train"]`, choose the epoch on `val`, answer `test` once; see `fit_epochs` and `FilmReader.batches` for errors.

    Parameters
    ----------
    augmentation
        Of training films; never a flip, because sides have meaning.
    progress
        Called with the number of films trained on since the last call.
    """
    size, train = model.config.vision.image_size_px, list(splits["train"])
    device = model.tau.device
    classifier = FilmClassifier(model, len(train[0].labels), seed).to(device)

    def losses(epoch: int) -> Iterator[Tensor]:
        rng = np.random.default_rng((seed, epoch))
        films = [train[row] for row in rng.permutation(len(train))]
        start = 0
        for squares in reader.batches(films, size, schedule.batch_size):
            labels = torch.from_numpy(label_table(films[start : start + len(squares)])).to(device)
            start += len(squares)
            yield _loss(classifier(to_images(np.stack([augment(square, augmentation, rng) for square in squares]), device)), labels)
            if progress is not None:
                progress(len(squares))

    groups = [
        {"params": list(classifier.encoder.parameters()), "lr": schedule.lr},
        {"params": [*classifier.norm.parameters(), *classifier.head.parameters()], "lr": schedule.head_lr},
    ]
    val = label_table(splits["val"])
    steps = -(-len(train) // schedule.batch_size)
    fit = fit_epochs(
        classifier,
        groups,
        schedule,
        steps,
        losses,
        lambda: mean_known_area(_answers(classifier, reader, splits["val"], size, schedule.batch_size), val),
        state_path,
    )
    return Trained(_answers(classifier, reader, splits["test"], size, schedule.batch_size), fit)


def mean_known_area(scores: NDArray[np.float64], labels: NDArray[np.int8]) -> float | None:
    """Mean area over the findings that have both classes."""
    areas = [
        area
        for column in range(labels.shape[1])
        if (known := labels[:, column] != UNKNOWN).any()
        and (area := roc_auc(scores[known, column], labels[known, column] == PRESENT)) is not None
    ]
    return float(np.mean(areas)) if areas else None


def _answers(classifier: FilmClassifier, reader: FilmReader, films: Sequence[TaskFilm], size: int, batch_size: int) -> NDArray[np.float64]:
    device = classifier.head.weight.device
    with torch.inference_mode():
        parts = [classifier(to_images(squares, device)).double().cpu() for squares in reader.batches(films, size, batch_size)]
    answers: NDArray[np.float64] = torch.cat(parts).numpy()
    return answers


def _loss(logits_BF: Tensor, labels_BF: Tensor) -> Tensor:
    """Cross-entropy of the known labels, 0 where there is none."""
    known = (labels_BF != UNKNOWN).float()
    each = functional.binary_cross_entropy_with_logits(logits_BF.float(), (labels_BF == PRESENT).float(), reduction="none")
    return (each * known).sum() / known.sum().clamp_min(1)
