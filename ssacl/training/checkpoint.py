"""The model folder: everything that inference needs, sealed by a manifest.

model.safetensors  config.yaml  wordpiece.json  language_model/  thresholds.json  manifest.json (last)

A folder imported from the released layout also has extras.safetensors (released tensors that the model does not hold), and lacks
language_model/ when the import was given none; its manifest says so.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ssacl
from ssacl.config import Config, load_config
from ssacl.data.storage import open_storage
from ssacl.data.tokenization import Tokenizers
from ssacl.errors import CheckpointError, ConfigError
from ssacl.models.divided import fill_state, full_shape
from ssacl.models.ssacl import SSACL
from ssacl.registry.addresses import resolve_model
from ssacl.training.sealed import check_folder, download_folder, new_folder, seal, sha256_of, upload_folder

__all__ = [
    "LoadedModel",
    "download_folder",
    "export_weights",
    "load_model_folder",
    "load_weights",
    "local_folder",
    "save_model_folder",
    "upload_folder",
]

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, THRESHOLDS, EXTRAS = "model.safetensors", "config.yaml", "thresholds.json", "extras.safetensors"
FORMAT = 1
_NUM_NAMES_SHOWN = 6


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory; `model` is in eval mode."""

    model: SSACL
    config: Config
    tokenizers: Tokenizers
    thresholds: dict[str, float]
    """Finding -> probability from which it counts as present; empty before the findings stage."""
    manifest: dict[str, Any]

    @property
    def model_version(self) -> str:
        return str(self.manifest["model_version"])


def save_model_folder(
    folder: str | Path,
    model: nn.Module,
    config: Config,
    tokenizers: Tokenizers,
    thresholds: Mapping[str, float],
    metrics: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
    state: Mapping[str, Tensor] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write a model folder, whole or not at all; gives its manifest.

    Parameters
    ----------
    model : module whose `state_dict` is stored in float32 or as it stands; tied tensors are stored once.
    provenance : data set hash, label policy, trained stages.
    state : replaces `model.state_dict()`, where the weights were gathered from several ranks.
    extras : tensors of a released checkpoint that travel beside the model.

    Raises
    ------
    StorageError
        The disk is full or refuses.
    """
    with new_folder(Path(folder)) as work:
        export_weights(work / WEIGHTS, model, state)
        (work / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
        tokenizers.save(work)
        if extras:
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in extras.items()}, work / EXTRAS)
        (work / THRESHOLDS).write_text(json.dumps(dict(thresholds), indent=1), encoding="utf-8")
        entries = {
            "format": FORMAT,
            "model_version": sha256_of(work / WEIGHTS)[:12],
            "code_version": ssacl.__version__,
            "tokenizer_fingerprint": tokenizers.fingerprint,
            "language_tokenizer": tokenizers.has_language,
            "metrics": dict(metrics),
            "provenance": dict(provenance or {}),
        }
        return seal(work, entries)


def load_model_folder(folder: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Read and verify a model folder (a local one; see `local_folder` for URLs).

    Raises
    ------
    CheckpointError
        Incomplete, damaged, made for another architecture, or with another tokenizer.
    """
    folder = Path(folder)
    manifest = check_folder(folder)
    if manifest.get("format") != FORMAT or WEIGHTS not in manifest["files"]:
        raise CheckpointError(
            f"{folder} is not a model folder of format {FORMAT} (format {manifest.get('format')!r}). "
            "Give the run's model/ folder, or export the checkpoint with `ssacl checkpoint export`."
        )
    try:
        config = load_config(folder / CONFIG)
    except ConfigError as error:
        raise CheckpointError(
            f"The configuration in {folder} does not fit this version of ssacl ({manifest['code_version']} wrote it): {error}"
        ) from error
    tokenizers = Tokenizers.load(folder, text_only=not manifest.get("language_tokenizer", True))
    if tokenizers.fingerprint != manifest["tokenizer_fingerprint"]:
        raise CheckpointError(f"The tokenizer files in {folder} are not those the model was trained with. Copy the whole folder again.")
    model = SSACL.from_config(config, tokenizers)
    load_weights(folder / WEIGHTS, model)
    return LoadedModel(model.to(device).eval(), config, tokenizers, read_thresholds(folder), manifest)


def read_thresholds(folder: Path) -> dict[str, float]:
    """Finding -> threshold of a model folder.

    Raises
    ------
    CheckpointError
        They are missing or damaged.
    """
    try:
        return {str(name): float(value) for name, value in json.loads((folder / THRESHOLDS).read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / THRESHOLDS} is not a mapping of findings to thresholds. Export the checkpoint again.") from error


@contextmanager
def local_folder(folder_or_url: str | Path) -> Iterator[Path]:
    """A local path of a model folder; one in object storage is fetched and verified first, and dropped at the end.

    `REGISTRY@stable` is the version that the channel points to now (`ssacl.registry`).

    Raises
    ------
    CheckpointError
        Incomplete or damaged in storage.
    """
    folder_or_url = resolve_model(str(folder_or_url))
    if "://" not in folder_or_url:
        yield Path(folder_or_url)
        return
    with tempfile.TemporaryDirectory(prefix="ssacl-model-") as parent:
        yield download_folder(open_storage(folder_or_url), "", Path(parent) / "model")


def export_weights(path: Path, model: nn.Module, state: Mapping[str, Tensor] | None = None) -> None:
    """Store the tensors of `model` (or `state`) as safetensors; of tied tensors, the first name."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    aliases = _tied_names(model)
    for name, tensor in (state if state is not None else model.state_dict()).items():
        kept = aliases.get(name, name)
        if kept != name:
            tied[name] = kept
        else:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    save_file(tensors, path, metadata={"tied": json.dumps(tied)})


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill `model` from a safetensors file, strictly.

    Raises
    ------
    CheckpointError
        The file is unreadable, tensors are missing or left over, or shapes differ; the message names them.
    """
    fill(model, read_tensors(path), str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises
    ------
    CheckpointError
        The file is unreadable.
    """
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: it is damaged or cut short. Copy it again.") from error


def fill(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Copy `tensors` into `model`; the message of the error begins with `name`. See `load_weights`."""
    aliases = _tied_names(model)
    own = {key: full_shape(value) for key, value in model.state_dict(keep_vars=True).items() if aliases.get(key, key) == key}
    given = {key: value for key, value in tensors.items() if aliases.get(key, key) == key}
    missing = sorted(own.keys() - given.keys())
    extra = sorted(given.keys() - own.keys())
    shapes = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(own[key])}" for key in own.keys() & given.keys() if given[key].shape != own[key]
    ]
    if missing or extra or shapes:
        parts = [
            f"{len(names)} tensors {what}: {_some(names)}"
            for what, names in (("missing", missing), ("unknown", extra), ("of another shape", sorted(shapes)))
            if names
        ]
        raise CheckpointError(
            f"{name} was made for another architecture. {'; '.join(parts)}. "
            "Compare the `model` section of your configuration with the checkpoint's config.yaml."
        )
    fill_state(model, given)


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter that has several -> the first of them."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(parameter), name) for name, parameter in model.named_parameters(remove_duplicate=False)}


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NUM_NAMES_SHOWN])
    return shown if len(names) <= _NUM_NAMES_SHOWN else f"{shown} and {len(names) - _NUM_NAMES_SHOWN} more"


def config_differences(stored: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two plain configuration trees, with both values."""
    found: list[str] = []
    for key in sorted(stored.keys() | present.keys()):
        old, new, name = stored.get(key), present.get(key), f"{prefix}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += config_differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} ({old!r} in the checkpoint, {new!r} now)")
    return found


def open_model(folder_or_url: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """`load_model_folder` for a local folder or an s3:// address."""
    with local_folder(folder_or_url) as folder:
        return load_model_folder(folder, device)
