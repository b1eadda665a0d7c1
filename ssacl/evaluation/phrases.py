"""Do phrases land on what they name? Findings with a side, on films with their truth: pointing, IoU and contrast beside simpler maps.

Three maps for each phrase: `phrase`, where the model sees what it says; `anatomy`, the model's map of the place that it names, blind to
the finding; `average`, the mean true mask of the same finding and side on validation films. Each is cut at its own validation threshold.

Shape letters: n phrases on films, S mask side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import from_numpy
from torch.nn import functional

from ssacl.data.dicom import Picture, read_picture
from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.errors import DataError
from ssacl.evaluation.grounding import CUTS
from ssacl.evaluation.predictions import sample_digest
from ssacl.evaluation.truth import load_truth, square_masks, studies_of
from ssacl.inference.generator import ReportGenerator
from ssacl.inference.grounding import Look, understand
from ssacl.phantom.truth import PhantomTruth
from ssacl.scores.map_measures import Measured, Threshold, iou_at, measure

WORDS = {
    "Lung Opacity": "lung opacity",
    "Lung Lesion": "lung nodule",
    "Consolidation": "consolidation",
    "Pneumonia": "pneumonia",
    "Atelectasis": "atelectasis",
    "Pneumothorax": "pneumothorax",
    "Pleural Effusion": "pleural effusion",
    "Pleural Other": "pleural thickening",
    "Fracture": "rib fracture",
}
"""Findings that have a side, as they are asked for."""
SIDES = ("right", "left")
MASK_SIDE_PX = 112
SYSTEMS = ("phrase", "anatomy", "average")


@dataclass
class _Asked:
    """What one split's films answered."""

    names: list[tuple[str, str]] = field(default_factory=list)
    """(finding, side) of each phrase that is true of its film."""
    masks: list[NDArray[np.bool_]] = field(default_factory=list)
    maps: dict[str, list[NDArray[np.float32]]] = field(default_factory=lambda: {"phrase": [], "anatomy": []})
    opposite: list[NDArray[np.float32]] = field(default_factory=list)
    """The map of the same finding on the other side."""
    confidence: list[tuple[str, bool, float]] = field(default_factory=list)
    """(finding, is it there?, confidence) of every phrase on every film."""


def phrase_scores(
    checkpoint_url: str | Path,
    data_url: str | Path,
    truth_folder: str | Path,
    split: str = "test",
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Ask every film of a split for every finding on either side.

    Parameters
    ----------
    checkpoint_url, data_url, truth_folder
        Model folder, phantom data set and its truth. Thresholds and average masks are taken from the split "val".
    limit
        First films of each split only.
    progress
        Called with the number of films asked since the last call.

    Returns
    -------
    dict
        `maps` (system -> pointing, iou, cnr, num), `by_finding`, `opposite` (share of pairs whose maps lie on their sides, mean
        correlation of the two maps), `confidence` (AUC of confidence for phrases that are true against those that are not).

    Raises
    ------
    DataError, SplitError, CheckpointError, GenerationError, StorageError
        As in `evaluate_split`.
    """
    if split == "val":
        raise DataError("Phrases are measured on the test split: their thresholds are chosen on val.")
    truth, generator = load_truth(truth_folder), ReportGenerator.load(checkpoint_url)
    fitted, asked = (_ask(generator, str(data_url), name, truth, limit, progress) for name in ("val", split))
    if not asked.names or not fitted.names:
        raise DataError("No film of a split has a finding with a side; raise the limit, or write more phantoms.")
    average = _average_masks(fitted)
    rows: dict[str, dict[str, list[Any]]] = {}
    for system in SYSTEMS:
        fit_maps, maps = (_stack(each, system, average) for each in (fitted, asked))
        threshold = _best_threshold(measure(fit_maps, np.stack(fitted.masks)[:, None], 0.0))
        masks = np.stack(asked.masks)
        measured = measure(maps, masks[:, None], 0.0)
        contrasts = [contrast(each[0], mask) for each, mask in zip(maps, masks, strict=True)]
        rows[system] = {"pointing": list(measured.hit[:, 0]), "iou": list(iou_at(measured, 0, threshold)), "cnr": contrasts}
    names = np.array([finding for finding, _ in asked.names])
    by_finding = {
        finding: {"num": int((names == finding).sum())} | {system: _means(rows[system], names == finding) for system in SYSTEMS}
        for finding in WORDS
        if (names == finding).any()
    }
    everything = np.ones(len(names), dtype=bool)
    return {
        "num_phrases": len(names),
        "maps": {system: _means(rows[system], everything) for system in SYSTEMS},
        "by_finding": by_finding,
        "opposite": _opposite(asked),
        "confidence": _confidence(asked),
    }


def _best_threshold(measured: Measured) -> Threshold:
    """The cut with the best mean IoU."""
    return max(CUTS, key=lambda cut: float(iou_at(measured, 0, cut).mean()))


def contrast(image: NDArray[np.float32], mask: NDArray[np.bool_]) -> float:
    """Contrast-to-noise ratio of a map [g, g] for a mask [S, S].

    The difference of the means inside and outside, over the root of the summed variances.
    """
    resized = functional.interpolate(from_numpy(np.array(image))[None, None], size=mask.shape, mode="bilinear", align_corners=False)
    values = resized[0, 0].double().numpy()
    inside, outside = values[mask], values[~mask]
    return float((inside.mean() - outside.mean()) / max(np.sqrt(inside.var() + outside.var()), 1e-12))


def _ask(
    generator: ReportGenerator, data_url: str, split: str, truth: PhantomTruth, limit: int | None, progress: Callable[[int], None] | None
) -> _Asked:
    storage, asked = open_storage(data_url), _Asked()
    for entry in open_split(storage, split, purpose="evaluation")[:limit]:
        sample = read_sample(storage, entry)
        picture = read_picture(sample.image)
        _ask_one(asked, generator.look(picture), picture, truth, sample_digest(sample))
        if progress is not None:
            progress(1)
    return asked


def _ask_one(asked: _Asked, look: Look, picture: Picture, truth: PhantomTruth, digest: str) -> None:
    (study,) = studies_of(truth, [digest])
    masks: dict[tuple[str, str], NDArray[np.bool_]] = {}
    for item in study.findings:
        if item.name in WORDS and item.mask is not None:
            for side in SIDES if item.side == "bilateral" else (item.side,):
                mask = square_masks(item.mask[None], MASK_SIDE_PX)[0]
                masks[item.name, side] = mask | masks.get((item.name, side), False)
    for finding, words in WORDS.items():
        meaning = {side: understand(f"{side} {words}") for side in SIDES}
        for side in SIDES:
            mask = masks.get((finding, side))
            asked.confidence.append((finding, mask is not None, look.confidence(meaning[side])))
            # Both sides at once has no opposite, and a mask without a pixel lies outside of the film.
            other = "left" if side == "right" else "right"
            if mask is None or not mask.any() or (finding, other) in masks:
                continue
            asked.names.append((finding, side))
            asked.masks.append(mask)
            asked.maps["phrase"].append(look.evidence(f"{side} {words}", meaning[side]))
            asked.maps["anatomy"].append(look.place(meaning[side]))
            asked.opposite.append(look.evidence(f"{other} {words}", meaning[other]))


def _average_masks(fitted: _Asked) -> dict[tuple[str, str], NDArray[np.float32]]:
    """(finding, side) -> mean mask of validation; what was never seen there gets the mean of all."""
    every = np.mean(fitted.masks, axis=0).astype(np.float32)
    means = dict.fromkeys(((finding, side) for finding in WORDS for side in SIDES), every)
    for name in set(fitted.names):
        means[name] = np.mean([mask for given, mask in zip(fitted.names, fitted.masks, strict=True) if given == name], axis=0).astype(
            np.float32
        )
    return means


def _stack(asked: _Asked, system: str, average: dict[tuple[str, str], NDArray[np.float32]]) -> NDArray[np.float32]:
    """[n, 1, g, g]."""
    return np.stack([average[name] for name in asked.names] if system == "average" else asked.maps[system])[:, None]


def _means(columns: dict[str, list[Any]], chosen: NDArray[np.bool_]) -> dict[str, float]:
    return {name: round(float(np.mean(np.array(values, dtype=np.float64)[chosen])), 4) for name, values in columns.items()}


def _opposite(asked: _Asked) -> dict[str, Any]:
    """A finding asked for on the right must be shown to the left of where it is shown when asked for on the left."""
    apart, correlations = [], []
    for (_, side), own, other in zip(asked.names, asked.maps["phrase"], asked.opposite, strict=True):
        ticks = np.arange(own.shape[1])
        x_own, x_other = (float(each.sum(0) @ ticks / each.sum()) for each in (own, other))
        apart.append(x_own < x_other if side == "right" else x_own > x_other)
        correlations.append(float(np.corrcoef(own.ravel(), other.ravel())[0, 1]))
    return {
        "on_their_sides": round(float(np.mean(apart)), 4),
        "mean_correlation": round(float(np.mean(correlations)), 4),
        "num": len(apart),
    }


def _confidence(asked: _Asked) -> dict[str, Any]:
    present = np.array([there for _, there, _ in asked.confidence])
    value = np.array([confidence for _, _, confidence in asked.confidence])
    names = np.array([finding for finding, _, _ in asked.confidence])
    by_finding = {}
    for finding in WORDS:
        own = names == finding
        if 0 < present[own].sum() < own.sum():
            by_finding[finding] = round(float(roc_auc_score(present[own], value[own])), 4)
    return {
        "auc": round(float(roc_auc_score(present, value)), 4),
        "auc_by_finding": by_finding,
        "mean_when_true": round(float(value[present].mean()), 4),
        "mean_when_not": round(float(value[~present].mean()), 4),
    }
