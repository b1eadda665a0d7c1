"""Data sets for `benchmarks.loader`: phantom films under many keys, and tiny ones to count with."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
from PIL import Image

from ssacl.data.records import Sample
from ssacl.data.reports import split_sections
from ssacl.data.shards import ShardIndex, ShardWriter
from ssacl.data.storage import Storage
from ssacl.data.tokenization import Tokenizers, train_tokenizers
from ssacl.phantom import generate_study

NUM_FILMS = 64
"""Different pictures; samples beyond them repeat their bytes under keys of their own."""
_VOCABULARY = 2000


def write_films(storage: Storage, num_samples: int, shard_size: int = 128, side_px: int = 512, num_validation: int = 0) -> Tokenizers:
    """Shards of JPEGs as ingest writes them (quality 95), with the phantoms' reports; returns tokenizers trained from these."""
    films = []
    for index in range(min(NUM_FILMS, num_samples)):
        study = generate_study(0, index, side_px)
        buffer = io.BytesIO()
        Image.fromarray(study.image).save(buffer, "JPEG", quality=95)
        films.append((buffer.getvalue(), split_sections(study.report)))
    made = [(film, sections.findings, sections.impression) for film, sections in films]
    splits = {"train": num_samples, "val": num_validation}
    _write(storage, {split: [made[number % len(made)] for number in range(count)] for split, count in splits.items()}, "jpg", shard_size)
    return train_tokenizers([f"{findings} {impression}" for _, findings, impression in made], _VOCABULARY, _VOCABULARY)


def write_tiny(storage: Storage, num_samples: int, shard_size: int = 1000) -> None:
    """Pictures of 16 x 16 pixels and reports of one sentence: only their number counts."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(buffer, "PNG")
    _write(storage, {"train": [(buffer.getvalue(), "No effusion.", "")] * num_samples}, "png", shard_size)


def bytes_of_samples(storage: Storage) -> int:
    """Size of all shards."""
    return sum(shard.bytes for shard in ShardIndex.load(storage).shards)


def _write(storage: Storage, splits: dict[str, list[tuple[bytes, str, str]]], image_format: str, shard_size: int) -> None:
    shards = []
    for split, contents in splits.items():
        for shard_number, first in enumerate(range(0, len(contents), shard_size)):
            writer = ShardWriter(storage, split, shard_number)
            for number, (image, findings, impression) in enumerate(contents[first : first + shard_size], first):
                key = hashlib.sha256(json.dumps(number).encode()).hexdigest()[:32]
                writer.add(Sample(key, image, image_format, findings=findings, impression=impression))
            shards.append(writer.close())
    ShardIndex(tuple(shards)).save(storage)
