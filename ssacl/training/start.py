"""Where a run's first weights come from: from scratch, from an encoder of masked-image pre-training (MAE), or from a model folder (an
imported release, or a model of ours).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ssacl.config import Config
from ssacl.data.storage import Storage, open_storage
from ssacl.data.tokenization import Tokenizers
from ssacl.errors import CheckpointError, ConfigError
from ssacl.models.official import OWN_PARTS, our_name, read_released_file
from ssacl.models.ssacl import SSACL
from ssacl.training.checkpoint import EXTRAS, WEIGHTS, fill, local_folder, read_tensors, read_thresholds
from ssacl.training.sealed import read_manifest

logger = logging.getLogger(__name__)

_ENCODER = "encoder."


def run_tokenizers(config: Config, data: Storage) -> Tokenizers:
    """The run's tokenizers: those of `run.init_from`, else of `data.tokenizer_url`, else those beside the data set.

    Raises
    ------
    ConfigError
        `data.tokenizer_url` names others than the model folder has, or the folder has none for its language model.
    """
    named = Tokenizers.load(open_storage(config.data.tokenizer_url)) if config.data.tokenizer_url else None
    if not config.run.init_from:
        return named or Tokenizers.load(data)
    with local_folder(config.run.init_from) as folder:
        own = Tokenizers.load(folder, text_only=not (folder / "language_model").is_dir())
    if not own.has_language:
        raise ConfigError(
            "The model of run.init_from was imported without its language model's tokenizer, so that no text can be trained: import it "
            "again with `ssacl checkpoint import ... --language-model DIR`."
        )
    if named is not None and named.fingerprint != own.fingerprint:
        raise ConfigError(
            "data.tokenizer_url holds other tokenizers than the model of run.init_from, whose weights mean nothing with them: "
            "leave data.tokenizer_url empty to take the model's."
        )
    return own


@dataclass(frozen=True)
class Start:
    """What a run takes over beside the weights."""

    extras: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that travel beside the model to the exported one."""
    stages: tuple[str, ...] = ()
    """Training stages that the weights have been through."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """Of the findings head, where it is taken over."""


def start_from(model: SSACL, init_from: str) -> Start:
    """Fill `model` from a model folder.

    Every tensor must be there and fit, but for the parts that a release lacks (`OWN_PARTS`): those start fresh where the folder has
    none, and are left behind where the configuration has none.

    Raises
    ------
    CheckpointError
        The folder is incomplete or damaged, or made for another architecture; the message names tensors and shapes.
    """
    with local_folder(init_from) as folder:
        tensors = read_tensors(folder / WEIGHTS)
        extras = read_tensors(folder / EXTRAS) if (folder / EXTRAS).exists() else {}
        stages, thresholds = read_manifest(folder).get("provenance", {}).get("stages", ()), read_thresholds(folder)
    _require_finite(tensors, init_from)
    own = model.state_dict()
    fresh = {name: value for name, value in own.items() if name.startswith(OWN_PARTS) and name not in tensors}
    left = sorted(name for name in tensors if name.startswith(OWN_PARTS) and name not in own)
    fill(model, {name: value for name, value in tensors.items() if name not in left} | fresh, str(init_from))
    for what, names in (("start fresh", sorted(fresh)), ("are left behind", left)):
        if names:
            logger.info(
                "%s: %d tensors of %s %s", init_from, len(names), ", ".join(sorted({name.partition(".")[0] for name in names})), what
            )
    if any(name.startswith("findings_head.") for name in fresh):
        return Start(extras, tuple(stage for stage in stages if stage != "findings"))
    return Start(extras, tuple(stages), thresholds)


def start_encoder_from(model: SSACL, path: str) -> None:
    """Fill the patch encoder from a ViT checkpoint in MAE's layout (a `.pth` file, `{"model": tensors}` or bare tensors).

    Its position table is taken too. Other tensors of the file (MAE's own decoder, a classification head) are left behind: ours differ.

    Raises
    ------
    CheckpointError
        The file cannot be read, a tensor of the encoder is missing, of another shape, or not finite.
    """
    state, _ = read_released_file(path)
    found = {str(our_name(name)): tensor for name, tensor in state.items() if str(our_name(name)).startswith(_ENCODER)}
    _require_finite(found, path)
    fill(model.encoder, {name.removeprefix(_ENCODER): tensor for name, tensor in found.items()}, path)
    logger.info("%s: %d tensors of the encoder taken, %d others left behind", path, len(found), len(state) - len(found))


def _require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    bad = sorted(name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all()))
    if bad:
        raise CheckpointError(
            f"{len(bad)} tensors of {source} hold values that are not finite (first: {bad[0]}). Take an earlier checkpoint."
        )
