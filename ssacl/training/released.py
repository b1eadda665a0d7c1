"""Released checkpoint file <-> model folder (`ssacl checkpoint import` and `export`); the layout itself is in `ssacl.models.official`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from tokenizers import Tokenizer

from ssacl.anatomy import LEAVES
from ssacl.config import Config, ModelConfig, load_config
from ssacl.data.tokenization import AbsentLanguageTokenizer, Tokenizers
from ssacl.errors import CheckpointError, ConfigError, StorageError
from ssacl.models.official import (
    OWN_PARTS,
    HeadCounts,
    Imported,
    export_released,
    import_released,
    infer_config,
    read_released_file,
)
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import EXTRAS, load_model_folder, local_folder, read_tensors, save_model_folder

logger = logging.getLogger(__name__)

_NOT_IN_TENSORS = ("dropout", "activation_checkpointing", "num_heads", "decoder_num_heads", "position_table")
"""Keys of the model section that no tensor tells: they come from the configuration."""
_SAME_GELU = ("gelu_new", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class ImportSummary:
    """What became of the tensors of a released file."""

    num_tensors: int
    imported: Imported
    has_language: bool
    model_version: str


@dataclass(frozen=True)
class ExportSummary:
    """What an exported file holds."""

    num_tensors: int
    left_out: tuple[str, ...]
    """Our tensors that the released layout has no place for."""


def import_checkpoint(
    path: Path, tokenizer: Path, out: Path, language_model: Path | None = None, config_path: Path | None = None
) -> ImportSummary:
    """Write the model folder of a released checkpoint; every bit of its tensors is kept, but for those dropped by name.

    Parameters
    ----------
    path
        The released `.pth` file.
    tokenizer
        The text encoder's WordPiece, one JSON file of the tokenizers library.
    out
        Model folder; written whole or not at all.
    language_model
        Folder with the language model's config.json and tokenizer; without it the model writes no text.
    config_path
        Configuration that gives the head counts (defaults 12/6/6/12) and the settings of further training. Sizes that it names must be
        those of the tensors.

    Raises
    ------
    CheckpointError
        The file is no released checkpoint, a tensor is missing, unknown, or not finite, sizes contradict each other, the configuration or
        the language model's config.json, or a tokenizer is too large for its embedding.
    ConfigError
        The configuration cannot be read.
    """
    state, epoch = read_released_file(path)
    base = load_config(config_path)
    language = _language_settings(language_model)
    heads = HeadCounts(
        base.model.vision.num_heads,
        base.model.vision.decoder_num_heads,
        base.model.text.num_heads,
        int(language.get("n_head", base.model.language.num_heads)),
    )
    sizes = infer_config(state, heads)
    _check_language_settings(language, sizes, language_model)
    _check_config(base.model, sizes)
    config = _complete(base, sizes)
    tokenizers = _tokenizers(tokenizer, language_model)
    with torch.random.fork_rng(devices=[]):
        # The parts that the release lacks start from the same values at every import.
        torch.manual_seed(0)
        try:
            model = SSACL.from_config(config, tokenizers)
        except ConfigError as error:
            raise CheckpointError(f"The tokenizers do not belong to this checkpoint. {error}") from error
    imported = import_released(model, state)
    if (words := tokenizers.text.get_vocab_size()) < sizes.text.vocab_size:
        logger.warning(
            "The text tokenizer has %d entries, the checkpoint %d: make sure that they belong together.", words, sizes.text.vocab_size
        )
    provenance = {
        "source": "released layout",
        "stages": ["joint"],
        "released": {
            "epoch": epoch,
            "extras": sorted(imported.extras),
            "dropped": imported.dropped,
            "fresh": list(imported.fresh),
        },
    }
    manifest = save_model_folder(out, model, config, tokenizers, {}, {}, provenance, extras=imported.extras)
    return ImportSummary(len(state), imported, tokenizers.has_language, str(manifest["model_version"]))


def export_checkpoint(folder_or_url: str | Path, out: Path) -> ExportSummary:
    """Write a model folder as a released checkpoint file, `{"model": tensors, "epoch": int}`, whole or not at all.

    Raises
    ------
    CheckpointError
        The folder is damaged, its model is not of the released kind, or it was not imported and so lacks the layout's extra tensors.
    StorageError
        The disk is full or refuses.
    """
    with local_folder(folder_or_url) as folder:
        loaded = load_model_folder(folder)
        extras = read_tensors(folder / EXTRAS) if EXTRAS in loaded.manifest["files"] else {}
    if loaded.config.model.wiring != "official":
        raise CheckpointError("Only a model of the wiring `official` can be exported: the released code computes no other.")
    state = export_released(loaded.model, extras)
    released = loaded.manifest.get("provenance", {}).get("released", {})
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": state, "epoch": int(released.get("epoch", 0))}, partial)
        os.replace(partial, out)
    # torch's writer turns a full disk into a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise StorageError(f"Cannot write {out}. Free space or choose another place, then run again.") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return ExportSummary(len(state), tuple(name for name in loaded.model.state_dict() if name.startswith(OWN_PARTS)))


def _language_settings(folder: Path | None) -> dict[str, Any]:
    """The language model's config.json; empty without a folder."""
    if folder is None:
        return {}
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable config.json: give the folder of the GPT-2 that the release builds on.") from error
    if not isinstance(settings, dict) or settings.get("model_type") != "gpt2":
        raise CheckpointError(f"{folder}/config.json does not describe a GPT-2, and the released checkpoint holds one.")
    return settings


def _check_language_settings(settings: dict[str, Any], sizes: ModelConfig, folder: Path | None) -> None:
    found = sizes.language
    expected = {"n_embd": found.width, "n_layer": found.depth, "vocab_size": found.vocab_size, "n_positions": found.max_positions}
    wrong = [f"{key} {settings[key]} instead of {value}" for key, value in expected.items() if settings.get(key, value) != value]
    if wrong:
        raise CheckpointError(f"{folder}/config.json describes another language model than the checkpoint holds: {', '.join(wrong)}.")
    if settings.get("activation_function", _SAME_GELU[0]) not in _SAME_GELU:
        raise CheckpointError(
            f"{folder}/config.json asks for the activation '{settings['activation_function']}'; the release has gelu_new."
        )


def _check_config(given: ModelConfig, found: ModelConfig) -> None:
    wrong = list(_contradictions(given, found, "model"))
    if wrong:
        raise CheckpointError(
            f"The checkpoint and --config disagree: {', '.join(wrong)}. Leave these keys out, or give its own configuration."
        )


def _contradictions(given: BaseModel, found: BaseModel, prefix: str) -> Iterator[str]:
    """Keys that were set in `given` to something else than `found` has."""
    for name in sorted(given.model_fields_set):
        mine, theirs = getattr(given, name), getattr(found, name)
        if isinstance(mine, BaseModel):
            yield from _contradictions(mine, theirs, f"{prefix}.{name}")
        elif name not in _NOT_IN_TENSORS and mine != theirs:
            yield f"{prefix}.{name} is {mine!r}, in the checkpoint {theirs!r}"


def _complete(base: Config, sizes: ModelConfig) -> Config:
    """The base configuration with the checkpoint's sizes, and texts that fit them."""
    text = sizes.text.model_copy(update={"dropout": base.model.text.dropout})
    language = sizes.language.model_copy(update={"dropout": base.model.language.dropout})
    checkpointing = base.model.activation_checkpointing
    model = sizes.model_copy(update={"text": text, "language": language, "activation_checkpointing": checkpointing})
    room = (language.max_positions - len(LEAVES) - 1 - sizes.vision.num_patches) // 2
    data = base.data.model_copy(
        update={
            "text_max_tokens": min(base.data.text_max_tokens, text.max_tokens),
            "lm_max_tokens": max(1, min(base.data.lm_max_tokens, room)),
        }
    )
    grounding = base.losses.grounding.model_copy(update={"enabled": False})
    return base.model_copy(update={"model": model, "data": data, "losses": base.losses.model_copy(update={"grounding": grounding})})


def _tokenizers(text_path: Path, language_model: Path | None) -> Tokenizers:
    try:
        text = Tokenizer.from_file(str(text_path))
    # The Rust side raises bare Exception, for a missing file as for a damaged one.
    except Exception as error:
        raise CheckpointError(f"{text_path} cannot be read as a tokenizer: give the JSON file of the text encoder's WordPiece.") from error
    lm: Any = AbsentLanguageTokenizer()
    if language_model is not None:
        from transformers import AutoTokenizer

        try:
            lm = AutoTokenizer.from_pretrained(str(language_model), local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise CheckpointError(f"No tokenizer can be read from {language_model}: it needs tokenizer.json beside config.json.") from error
    return Tokenizers(text, lm)
