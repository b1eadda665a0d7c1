"""Does a sentence rest on the patches that its evidence map shows? Take them away, and the sentence should become less likely.

The patches that hold the most evidence of a sentence are removed from the image (the encoder never sees them, the findings head sees grey,
and the language model has no slot for them), and the sentence's log-likelihood is read again by the forward pass of training, given the
entities and leaves that the model infers from what is left, and the same text before it. The same is done with as many patches drawn at
random.

Shape letters: B removals, N patches, k removed patches, D vision width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssacl.data.dicom import Picture, read_picture
from ssacl.data.loader import open_split
from ssacl.data.shards import read_sample
from ssacl.data.storage import open_storage
from ssacl.data.transforms import load_square, normalise
from ssacl.errors import DataError
from ssacl.inference.decoding import GenerationOptions, token_probabilities
from ssacl.inference.generator import ReportGenerator
from ssacl.inference.maps import restrict_to_picture
from ssacl.inference.report import DraftReport, Sentence
from ssacl.models.encoded import Encoded
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import LoadedModel, open_model

REMOVED_SHARE = 0.2
NUM_DRAWS = 5
"""Random removals per sentence."""
NUM_RESAMPLES = 2000
_MIN_ON_PICTURE = 0.5  # share of a patch that must show the picture, not padding
_TINY = 1e-12


@dataclass(frozen=True)
class _Drop:
    """By how much a sentence's log-likelihood falls, in nats."""

    film: int
    kind: str
    """"present": states a finding; "absent": denies one, or states something normal; "other"."""
    evidence: float
    random: float
    """Mean over the draws."""


def faithfulness_scores(
    checkpoint_url: str | Path,
    data_url: str | Path,
    split: str = "test",
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
    seed: int = 0,
    options: GenerationOptions | None = None,
) -> dict[str, Any]:
    """Remove evidence and random patches of every sentence that the model writes about a split's films.

    Parameters
    ----------
    checkpoint_url, data_url, split
        Model folder, data set root, and "val" or "test".
    limit
        First films only.
    progress
        Called with the number of films done since the last call.
    seed
        Of the draws and of the bootstrap.
    options
        Report search.

    Returns
    -------
    dict
        For `all` sentences and per kind: mean drops, their paired difference with a 95 % bootstrap interval over films, the share of
        sentences that fall more, and numbers of sentences and films.

    Raises
    ------
    DataError, SplitError, CheckpointError, GenerationError, StorageError
        As in `evaluate_split`.
    """
    storage, rng = open_storage(str(data_url)), np.random.default_rng(seed)
    loaded = open_model(str(checkpoint_url), "cpu")
    generator = ReportGenerator(loaded, "cpu")
    drops: list[_Drop] = []
    entries = open_split(storage, split, purpose="evaluation")[:limit]
    for film, entry in enumerate(entries):
        picture = read_picture(read_sample(storage, entry).image)
        drops += _film_drops(loaded, generator, picture, film, rng, options or GenerationOptions())
        if progress is not None:
            progress(1)
    if not drops:
        raise DataError("No film of the split has a sentence to test: the model writes nothing, or the limit leaves no film.")
    kinds = {"all": drops} | {kind: [drop for drop in drops if drop.kind == kind] for kind in ("present", "absent", "other")}
    return {kind: _summary(chosen, rng) for kind, chosen in kinds.items() if chosen}


def _film_drops(
    loaded: LoadedModel, generator: ReportGenerator, picture: Picture, film: int, rng: np.random.Generator, options: GenerationOptions
) -> list[_Drop]:
    (draft,) = generator.generate([picture], options)
    if not draft.sentences:
        return []
    grid = loaded.config.model.vision.grid
    on_picture = restrict_to_picture(np.ones((grid, grid)), draft.map_frame, draft.image_width_px, draft.image_height_px)
    candidates = np.flatnonzero(on_picture.ravel() >= _MIN_ON_PICTURE)
    num_removed = max(1, round(REMOVED_SHARE * len(candidates)))
    removals: list[NDArray[np.int64]] = []
    for sentence in draft.sentences:
        score_P = _on_patches(sentence.evidence, grid)[candidates]
        removals.append(candidates[np.argsort(-score_P, kind="stable")[:num_removed]])
    # The draws are shared by the film's sentences: each is a removal of its own all the same.
    removals += [rng.choice(candidates, num_removed, replace=False) for _ in range(NUM_DRAWS)]
    whole = _sentence_likelihoods(generator, loaded, picture, draft, [np.zeros(0, np.int64)])[0]
    without = _sentence_likelihoods(generator, loaded, picture, draft, removals)
    num_sentences = len(draft.sentences)
    return [
        _Drop(film, _kind(sentence), float(whole[i] - without[i, i]), float(whole[i] - without[num_sentences:, i].mean()))
        for i, sentence in enumerate(draft.sentences)
    ]


def _on_patches(evidence: NDArray[np.float32], grid: int) -> NDArray[np.float64]:
    """[N] mass of a map [g, g] in each patch; g is a multiple of the grid."""
    finer = evidence.shape[0] // grid
    masses: NDArray[np.float64] = evidence.reshape(grid, finer, grid, finer).sum((1, 3), dtype=np.float64).ravel()
    return masses


def _kind(sentence: Sentence) -> str:
    if sentence.status in ("present", "uncertain") and sentence.finding is not None:
        return "present"
    return "absent" if sentence.status == "absent" else "other"


def _sentence_likelihoods(
    generator: ReportGenerator, loaded: LoadedModel, picture: Picture, draft: DraftReport, removals: list[NDArray[np.int64]]
) -> NDArray[np.float64]:
    """[B, sentences] log-likelihood of each sentence of the draft, with each set of patches removed (sets of one size)."""
    model, tokenizer = loaded.model, loaded.tokenizers
    square = load_square(picture.pixels, loaded.config.model.vision.image_size_px)[0]
    image = torch.as_tensor(normalise(square))[None].expand(len(removals), -1, -1, -1)
    with torch.inference_mode():
        seen, kept_BN = _seen_without(model, image, torch.as_tensor(np.stack(removals)))
        given = generator.conditions(seen, model.findings_read(seen))
    mask = torch.cat([given.mask[:, : -kept_BN.shape[1]], kept_BN], 1)
    texts = [" ".join(sentence.text for sentence in draft.sentences[: count + 1]) for count in range(len(draft.sentences))]
    ends = [0, *(len(tokenizer.lm_ids(text)) for text in texts)]
    report = tokenizer.lm_ids(texts[-1])
    probabilities = token_probabilities(model.language, given.prefix, mask, given.prompts, [report] * len(removals))
    logs = np.log(np.maximum(np.array(probabilities), _TINY))
    return np.stack([logs[:, start:end].sum(1) for start, end in pairwise(ends)], 1)


def _seen_without(model: SSACL, image: Tensor, removed_Bk: Tensor) -> tuple[Encoded, Tensor]:
    """Images encoded without some patches, and the patches that are left, [B, N] bool.

    A removed patch keeps its slot, so that positions stay; it is for the caller to let nothing look at it.
    """
    num_rows, num_patches = len(image), model.config.vision.num_patches
    kept_BN = torch.ones(num_rows, num_patches, dtype=torch.bool).scatter(1, removed_Bk, False)
    keep_BV = kept_BN.nonzero()[:, 1].view(num_rows, -1)
    encoded = model.encode(image, keep_BV)
    seen = dataclasses.replace(
        encoded,
        patches_BND=_in_all_slots(encoded.patches_BND.transpose(1, 2), keep_BV, num_patches).transpose(1, 2),
        attention_BGN=_in_all_slots(encoded.attention_BGN, keep_BV, num_patches),
        image_BCHW=_greyed(image, kept_BN),
    )
    return seen, kept_BN


def _in_all_slots(kept_BCV: Tensor, keep_BV: Tensor, num_patches: int) -> Tensor:
    """[B, C, N]: values of the kept patches in their slots, 0 elsewhere."""
    return kept_BCV.new_zeros(*kept_BCV.shape[:2], num_patches).scatter(2, keep_BV[:, None].expand_as(kept_BCV), kept_BCV)


def _greyed(image_BCHW: Tensor, kept_BN: Tensor) -> Tensor:
    """The images with removed patches in the mean grey of the rest."""
    grid = math.isqrt(kept_BN.shape[1])
    kept = kept_BN.view(-1, 1, grid, grid).to(image_BCHW.dtype)
    kept = kept.repeat_interleave(image_BCHW.shape[2] // grid, 2).repeat_interleave(image_BCHW.shape[3] // grid, 3)
    mean = (image_BCHW * kept).sum((2, 3), keepdim=True) / kept.sum((2, 3), keepdim=True)
    return image_BCHW * kept + mean * (1 - kept)


def _summary(drops: list[_Drop], rng: np.random.Generator) -> dict[str, Any]:
    films = np.array([drop.film for drop in drops])
    difference = np.array([drop.evidence - drop.random for drop in drops])
    # Sentences of one film are not independent: films are drawn, with all that was written about them.
    by_film = [difference[films == film] for film in np.unique(films)]
    sums, counts = np.array([each.sum() for each in by_film]), np.array([len(each) for each in by_film])
    draws = rng.integers(0, len(by_film), (NUM_RESAMPLES, len(by_film)))
    low, high = np.quantile(sums[draws].sum(1) / counts[draws].sum(1), (0.025, 0.975))
    return {
        "drop_evidence": round(float(np.mean([drop.evidence for drop in drops])), 4),
        "drop_random": round(float(np.mean([drop.random for drop in drops])), 4),
        "difference": round(float(difference.mean()), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "share_falling_more": round(float((difference > 0).mean()), 4),
        "num_sentences": len(drops),
        "num_films": len(by_film),
    }
