"""The mirror test: a film turned left to right must read left for right, in its maps, its findings and its words.

Agreement alone is no proof: a model that ignores the picture agrees with itself. So the share of right answers, on the films as they
are and mirrored, stands beside every agreement.

Shape letters: n films, G = 32 nodes, M = 25 leaves, F = 14 findings, g grid side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ssacl.anatomy import FINDING_INDEX, FINDINGS, NO_FINDING, NODE_INDEX, NODES, SIDED_LEAVES, SIDES, TWIN_NODES, FindingStatus, mirrored
from ssacl.data.dicom import Picture, read_picture
from ssacl.data.labeler import label_report
from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.data.transforms import load_square, normalise
from ssacl.errors import DataError
from ssacl.evaluation.predictions import sample_digest
from ssacl.evaluation.truth import load_truth, one_sided
from ssacl.inference.generator import ReportGenerator
from ssacl.inference.report import DraftReport
from ssacl.scores.mirrored import mirror_picture, twins_agree
from ssacl.training.checkpoint import LoadedModel, open_model

NUM_RESAMPLES = 1000
_CHUNK = 16
_OTHER = {"right": "left", "left": "right"}


@dataclass(frozen=True)
class _Answer:
    """What one film was answered, as it is or mirrored."""

    centroids: NDArray[np.float64]
    """[G, 2] of the maps, half-widths."""
    present: NDArray[np.bool_]
    """[F] decisions of the findings head."""
    probabilities: NDArray[np.float64]
    sides: NDArray[np.float64]
    """[F] strongest evidence among the right leaves minus that among the left ones, as probabilities."""
    words: dict[str, str]
    """Finding -> side, for findings that the report states on exactly one side."""


def mirror_scores(
    checkpoint_url: str | Path,
    data_url: str | Path,
    split: str,
    truth_folder: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Answer each film of a split as it is and mirrored, and compare.

    Parameters
    ----------
    checkpoint_url, data_url, split
        The model folder, the data set root, and "val" or "test".
    truth_folder
        Truth of a phantom data set; with it, the side of one-sided findings is also compared with what is in the picture.
    limit
        First films of the split only.
    progress
        Called with the number of films answered since the last call.
    seed
        Of the bootstrap.

    Returns
    -------
    dict
        `maps`, `findings`, `text`: each `agreement` = {"value", "num", "interval": 95 % over films}, with the figures beside it.

    Raises
    ------
    SplitError, DataError, CheckpointError, GenerationError, StorageError
        As in `evaluate_split`.
    """
    storage = open_storage(str(data_url))
    entries = open_split(storage, split, purpose="evaluation")[:limit]
    if not entries:
        raise DataError(f"A limit of {limit} leaves no case of the split '{split}'; give at least 1.")
    truth = None if truth_folder is None else load_truth(truth_folder)
    loaded = open_model(str(checkpoint_url), "cpu")
    generator = ReportGenerator(loaded, "cpu")
    plain: list[_Answer] = []
    turned: list[_Answer] = []
    true_sides: list[dict[str, str]] = []
    for start in range(0, len(entries), _CHUNK):
        samples = [read_sample(storage, entry) for entry in entries[start : start + _CHUNK]]
        pictures = [read_picture(sample.image) for sample in samples]
        plain += _answers(generator, loaded, pictures)
        turned += _answers(generator, loaded, [mirror_picture(picture) for picture in pictures])
        true_sides += [{} if truth is None else one_sided(truth, sample_digest(sample)) for sample in samples]
        if progress is not None:
            progress(len(samples))
    pairs = list(zip(plain, turned, strict=True))
    rng = np.random.default_rng(seed)
    scores: dict[str, Any] = {
        "num_films": len(pairs),
        "maps": _maps(pairs, rng),
        "findings": _findings(pairs, rng),
        "text": _text(pairs, rng),
    }
    if truth is not None:
        scores["findings"]["side"] |= _against_truth(pairs, true_sides, lambda answer, name: _side(answer.sides[FINDING_INDEX[name]]))
        scores["text"] |= _against_truth(pairs, true_sides, lambda answer, name: answer.words.get(name, ""))
    return scores


def _answers(generator: ReportGenerator, loaded: LoadedModel, pictures: list[Picture]) -> Iterator[_Answer]:
    size = loaded.config.model.vision.image_size_px
    images = torch.stack([torch.as_tensor(normalise(load_square(picture.pixels, size)[0])) for picture in pictures])
    with torch.inference_mode():
        evidence_BMF = loaded.model.findings_read(loaded.model.encode(images)).leaves_BMF.sigmoid().double().numpy()
    for draft, evidence_MF in zip(generator.generate(pictures), evidence_BMF, strict=True):
        right, left = (evidence_MF[list(SIDED_LEAVES[side])].max(0) for side in SIDES)
        yield _Answer(
            centroids=_centroids(draft.anatomy_maps),
            present=np.array([finding.present for finding in draft.findings]),
            probabilities=np.array([finding.probability for finding in draft.findings]),
            sides=right - left,
            words=_words(draft),
        )


def _centroids(maps: NDArray[np.float32]) -> NDArray[np.float64]:
    ticks = (np.arange(maps.shape[-1]) * 2 + 1) / maps.shape[-1] - 1
    weights = maps.astype(np.float64)
    centroids: NDArray[np.float64] = np.stack((weights.sum(1) @ ticks, weights.sum(2) @ ticks), -1) / weights.sum((1, 2))[:, None]
    return centroids


def _words(draft: DraftReport) -> dict[str, str]:
    named: dict[str, set[str]] = {}
    for mention in label_report(draft.text).mentions:
        if mention.finding is not None and mention.status is FindingStatus.PRESENT:
            sides = {side for side in SIDES if any(leaf.startswith(side + " ") and mirrored(leaf) != leaf for leaf in mention.leaves)}
            named.setdefault(mention.finding, set()).update(sides or {""})
    return {finding: next(iter(sides)) for finding, sides in named.items() if len(sides) == 1 and sides != {""}}


def _maps(pairs: list[tuple[_Answer, _Answer]], rng: np.random.Generator) -> dict[str, Any]:
    """A node's centroid on the mirrored film lies where its twin's on the plain film is mirrored to."""
    films, midline = [], NODE_INDEX["spine"]
    on_side: dict[str, list[bool]] = {"plain": [], "mirrored": []}
    for plain, turned in pairs:
        films.append(twins_agree(plain.centroids, turned.centroids))
        for name, answer in (("plain", plain), ("mirrored", turned)):
            offset = answer.centroids[:, 0] - answer.centroids[midline, 0]
            # The patient's right is on the left of the image, also of a mirrored one: its heart then lies on the right.
            on_side[name] += [
                offset[i] < 0 if node.startswith("right ") else offset[i] > 0 for i, node in enumerate(NODES) if TWIN_NODES[i] != i
            ]
    return {"agreement": _share(films, rng), "on_their_side": {name: float(np.mean(values)) for name, values in on_side.items()}}


def _findings(pairs: list[tuple[_Answer, _Answer]], rng: np.random.Generator) -> dict[str, Any]:
    counted = [index for index, name in enumerate(FINDINGS) if name != NO_FINDING]
    decisions = [plain.present[counted] == turned.present[counted] for plain, turned in pairs]
    sides = []
    for plain, turned in pairs:
        both = plain.present & turned.present
        both[FINDING_INDEX[NO_FINDING]] = False
        sides.append(np.sign(plain.sides[both]) == -np.sign(turned.sides[both]))
    change = np.mean([np.abs(plain.probabilities - turned.probabilities)[counted].mean() for plain, turned in pairs])
    return {"agreement": _share(decisions, rng), "mean_probability_change": float(change), "side": {"agreement": _share(sides, rng)}}


def _text(pairs: list[tuple[_Answer, _Answer]], rng: np.random.Generator) -> dict[str, Any]:
    """Of the findings stated on one side in both reports: the share whose sides are opposite; and how many have a counterpart."""
    opposite, stated, matched = [], 0, 0
    for plain, turned in pairs:
        both = plain.words.keys() & turned.words.keys()
        opposite.append(np.array([turned.words[name] == _OTHER[plain.words[name]] for name in sorted(both)], dtype=bool))
        stated += len(plain.words) + len(turned.words)
        matched += 2 * int(opposite[-1].sum())
    shared = sum(len(each) for each in opposite)
    return {
        "agreement": _share(opposite, rng),
        "coverage": None if not stated else 2 * shared / stated,
        "statement_f1": None if not stated else matched / stated,
    }


def _against_truth(
    pairs: list[tuple[_Answer, _Answer]], true_sides: list[dict[str, str]], answer: Callable[[_Answer, str], str]
) -> dict[str, Any]:
    """Share of one-sided true findings whose side is answered rightly, of those with an answer."""
    counts = {"plain": [0, 0], "mirrored": [0, 0]}
    for (plain, turned), sides in zip(pairs, true_sides, strict=True):
        for name, side in sides.items():
            for key, film, right in (("plain", plain, side), ("mirrored", turned, _OTHER[side])):
                if film.present[FINDING_INDEX[name]] and (given := answer(film, name)):
                    counts[key][0] += given == right
                    counts[key][1] += 1
    return {f"right_side_{key}": {"value": hit / num if num else None, "num": num} for key, (hit, num) in counts.items()}


def _side(difference: float) -> str:
    return "right" if difference > 0 else "left" if difference < 0 else ""


def _share(films: list[NDArray[np.bool_]], rng: np.random.Generator) -> dict[str, Any]:
    """Share of true answers over all films, and its 95 % bootstrap interval, films drawn with replacement."""
    hits, counts = np.array([each.sum() for each in films]), np.array([len(each) for each in films])
    if not counts.sum():
        return {"value": None, "num": 0, "interval": None}
    draws = rng.integers(0, len(films), (NUM_RESAMPLES, len(films)))
    resampled = hits[draws].sum(1) / np.maximum(counts[draws].sum(1), 1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return {"value": float(hits.sum() / counts.sum()), "num": int(counts.sum()), "interval": [float(low), float(high)]}
