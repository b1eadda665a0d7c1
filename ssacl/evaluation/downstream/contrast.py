"""Films and texts in the space of the global contrast (METHOD section 4, L_cl): what zero-shot classification and retrieval compare.

A film is the mean over its patches, none masked, of their projection `img_mlp`; a text is the text encoder's pooled output. Both are
normalised, so that a product is a cosine.

Shape letters: b films of a part, n films, T text width, F = 14 findings.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ssacl.data.records import Sample
from ssacl.data.reports import training_text
from ssacl.data.shards import SampleEntry, read_sample
from ssacl.data.storage import Storage
from ssacl.data.tokenization import pad
from ssacl.data.transforms import load_square
from ssacl.errors import CheckpointError, ConfigError, GenerationError
from ssacl.evaluation.cases import text_digest
from ssacl.evaluation.downstream.features import PART, to_images
from ssacl.evaluation.predictions import sample_status
from ssacl.inference.files import write_whole
from ssacl.training.checkpoint import LoadedModel

logger = logging.getLogger(__name__)

_STAGES = {"contrastive", "joint"}


@dataclass(frozen=True)
class Embedded:
    """n films of a split, in its order."""

    image: NDArray[np.float32]
    """[n, T]."""
    text: NDArray[np.float32]
    """[n, T] of the reports; zeros where there is none."""
    num_tokens: NDArray[np.int64]
    """[n] of the whole report; 0 without one. What the encoder has no room for is cut."""
    text_key: NDArray[np.str_]
    """[n] hash of the report: equal reports have equal keys."""
    patient: NDArray[np.str_]
    status: NDArray[np.int64]
    """[n, F] `FindingStatus`."""
    labelled: NDArray[np.bool_]
    """[n]."""


def require_contrast(loaded: LoadedModel) -> None:
    """Refuse a checkpoint whose manifest says that films and texts were never contrasted.

    Raises
    ------
    CheckpointError
        None of its stages is `contrastive` or `joint`.
    """
    stages = loaded.manifest.get("provenance", {}).get("stages")
    if stages is not None and not _STAGES & set(stages):
        raise CheckpointError(
            f"The checkpoint was trained in the stages {', '.join(stages) or 'none'}: films and texts share no space before the stage "
            "'contrastive' (or 'joint'). Give a checkpoint of such a run."
        )


def embed_texts(loaded: LoadedModel, texts: Sequence[str], what: str) -> NDArray[np.float32]:
    """[n, T] of prompts, none of which may be cut.

    Raises
    ------
    ConfigError
        A prompt has no word, or more tokens than the text encoder reads.
    """
    limit = loaded.config.data.text_max_tokens
    rows = [loaded.tokenizers.text_ids(text) for text in texts]
    for text, ids in zip(texts, rows, strict=True):
        if not text.strip() or len(ids) > limit:
            raise ConfigError(f"{what}: the prompt '{text[:60]}' has {len(ids)} tokens; one of 2 to {limit} was expected.")
    return _texts(loaded, rows)


def embed_split(
    loaded: LoadedModel,
    storage: Storage,
    entries: Sequence[SampleEntry],
    kept_in: Path,
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Embed samples; parts that `kept_in` has already are not made again.

    Raises
    ------
    DataError, ImageError, StorageError
        A sample cannot be read, or the disk refuses.
    GenerationError
        The weights give values that are not finite.
    """
    parts = []
    for start in range(0, len(entries), PART):
        own = entries[start : start + PART]
        path = kept_in / f"{_name(loaded, own)}.npz"
        part = _kept(path, len(own))
        if part is None:
            part = _embedded(loaded, [read_sample(storage, entry) for entry in own])
            content = io.BytesIO()
            np.savez(content, **vars(part))
            write_whole(path, content.getvalue())
        parts.append(part)
        if progress is not None:
            progress(len(own))
    return Embedded(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Embedded)))


def _embedded(loaded: LoadedModel, samples: Sequence[Sample]) -> Embedded:
    model, config = loaded.model, loaded.config
    squares = np.stack([load_square(sample, config.model.vision.image_size_px)[0] for sample in samples])
    with torch.inference_mode():
        patches = model.encoder(to_images(squares, model.tau.device)).patches_BVD
        image = functional.normalize(model.img_mlp(patches).mean(1).float(), dim=-1).cpu().numpy()
    if not np.isfinite(image).all():
        raise GenerationError("The checkpoint's weights give values that are not finite; they are damaged. Give another checkpoint.")
    reports = [training_text(sample, config.data.sections) for sample in samples]
    told = [row for row, report in enumerate(reports) if report]
    ids = [loaded.tokenizers.text_ids(reports[row]) for row in told]
    text, num_tokens = np.zeros_like(image), np.zeros(len(samples), dtype=np.int64)
    if told:
        text[told] = _texts(loaded, [row[: config.data.text_max_tokens] for row in ids])
        num_tokens[told] = [len(row) for row in ids]
    return Embedded(
        image,
        text,
        num_tokens,
        np.array([text_digest(report) for report in reports]),
        np.array([sample.patient_key or sample.key for sample in samples]),
        np.array([sample_status(sample) for sample in samples], dtype=np.int64),
        np.array([bool(sample.labels) for sample in samples]),
    )


def _texts(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    ids, mask = pad([list(row) for row in rows], loaded.tokenizers.text_pad_id)
    device = loaded.model.tau.device
    with torch.inference_mode():
        text = functional.normalize(loaded.model.text(ids.to(device), mask.to(device)).float(), dim=-1)
    found: NDArray[np.float32] = text.cpu().numpy()
    return found


def _name(loaded: LoadedModel, entries: Sequence[SampleEntry]) -> str:
    keys = "\n".join(f"{entry.key}|{entry.crc32}" for entry in entries)
    return hashlib.sha256(f"{loaded.model_version}|{loaded.config.data.sections}|{keys}".encode()).hexdigest()[:32]


def _kept(path: Path, count: int) -> Embedded | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            kept = Embedded(*(stored[item.name] for item in fields(Embedded)))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        logger.warning("%s is damaged and is made again", path.name)
        return None
    return kept if len(kept.image) == count else None
