"""A data set of a few drawn films for the training tests: written with the real shard writer, tokenizers included."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssacl.anatomy import FINDING_INDEX, FINDINGS, FindingStatus
from ssacl.config import Config, parse_config
from ssacl.data.records import Sample
from ssacl.data.shards import ShardIndex, ShardWriter
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import train_tokenizers

NUM_SAMPLES = {"train": 20, "val": 8, "test": 4}
EFFUSION = "Small left pleural effusion. The heart size is normal."
NORMAL = "The lungs are clear. No pleural effusion or pneumothorax."


def drawn_film(rng: np.random.Generator, effusion: bool, size_px: int = 48) -> bytes:
    """A PNG: two dark lungs on grey, a white left base with an effusion, noise."""
    y, x = np.mgrid[0:size_px, 0:size_px] / size_px
    film = np.full((size_px, size_px), 150.0) + rng.normal(0, 8, (size_px, size_px))
    for centre in (0.3, 0.7):
        film[((x - centre) / 0.16) ** 2 + ((y - 0.5) / 0.32) ** 2 < 1] -= 90
    if effusion:
        film[(x > 0.5) & (y > 0.68)] = 220
    buffer = io.BytesIO()
    Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


def write_training_set(folder: Path) -> Path:
    """Shards of all three splits, the index and tokenizers under `folder`."""
    rng = np.random.default_rng(5)
    storage = open_storage(str(folder))
    shards, texts = [], []
    for split, count in NUM_SAMPLES.items():
        writer = ShardWriter(storage, split)
        for number in range(count):
            effusion = number % 2 == 0
            labels = [int(FindingStatus.UNMENTIONED)] * len(FINDINGS)
            labels[FINDING_INDEX["Pleural Effusion"]] = int(FindingStatus.PRESENT if effusion else FindingStatus.ABSENT)
            labels[FINDING_INDEX["No Finding"]] = int(FindingStatus.ABSENT if effusion else FindingStatus.PRESENT)
            writer.add(
                Sample(
                    key=f"{split}{number:04d}",
                    image=drawn_film(rng, effusion),
                    image_format="png",
                    patient_key=f"p{split}{number}",
                    view="PA",
                    width_px=48,
                    height_px=48,
                    original_width_px=48,
                    original_height_px=48,
                    findings=EFFUSION if effusion else NORMAL,
                    impression="Pleural effusion." if effusion else "No acute disease.",
                    labels=tuple(labels),
                    anatomy_groups=("lungs", "abdomen") if effusion else (),
                )
            )
        shards.append(writer.close())
    texts = [EFFUSION, NORMAL, "Pleural effusion.", "No acute disease."]
    ShardIndex(tuple(shards), "test").save(storage)
    train_tokenizers(texts * 4, 200, 300).save(folder)
    return folder


def tiny_tree(data: Path | str, runs: Path | str) -> dict[str, Any]:
    """A configuration that takes milliseconds a step; plain torch, float32."""
    return {
        "data": {"url": str(data), "text_max_tokens": 48, "lm_max_tokens": 48, "num_loader_threads": 0},
        "model": {
            "vision": {"image_size_px": 48, "patch_size_px": 8, "width": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
            | {"decoder_width": 32, "decoder_depth": 1, "decoder_num_heads": 2},
            "text": {"width": 32, "depth": 1, "num_heads": 2, "ffn_width": 64, "max_tokens": 48},
            "language": {"width": 32, "depth": 1, "num_heads": 2, "max_positions": 256},
        },
        "optim": {"lr": 1e-3, "lm_lr_scale": 1.0},
        "engine": {"kind": "torch", "precision": "fp32", "micro_batch_size": 4},
        "run": {
            "name": "tiny",
            "storage_url": str(runs),
            "stages": [
                {"kind": "contrastive", "num_steps": 6},
                {"kind": "generation", "num_steps": 4},
                {"kind": "findings", "num_steps": 4},
            ],
            "checkpoint_every_steps": 3,
            "validate_every_steps": 100,
            "log_every_steps": 1,
        },
    }


def tiny_config(data: Path | str, runs: Path | str, **sections: dict[str, Any]) -> Config:
    """`tiny_tree` with some keys of some sections replaced."""
    tree = tiny_tree(data, runs)
    for section, values in sections.items():
        tree[section] |= values
    return parse_config(tree)
