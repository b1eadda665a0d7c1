"""Prompts of zero-shot classification and retrieval by class: a YAML file with sentences that say a finding, and sentences that deny it.

findings:
  Pleural Effusion:
    present: [There is a pleural effusion.]
    absent: [There is no pleural effusion.]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ssacl.anatomy import FINDINGS
from ssacl.errors import ConfigError
from ssacl.evaluation.downstream.contrast import embed_texts
from ssacl.training.checkpoint import LoadedModel

SIDES = ("present", "absent")


@dataclass(frozen=True)
class PromptPair:
    """Sentences of one finding; each side is the mean of its sentences."""

    present: tuple[str, ...]
    absent: tuple[str, ...]


@dataclass(frozen=True)
class Prompts:
    """A prompt file."""

    pairs: dict[str, PromptPair]
    """Finding -> prompts, in `FINDINGS` order."""
    sha256: str

    def of(self, findings: Sequence[str]) -> dict[str, PromptPair]:
        """The pairs of some findings, of all that have prompts if none is named.

        Raises
        ------
        ConfigError
            A finding is unknown, or has no prompts.
        """
        for name in findings:
            if name not in FINDINGS:
                raise ConfigError(f"'{name}' is no finding; expected some of: {', '.join(FINDINGS)}.")
            if name not in self.pairs:
                raise ConfigError(f"The prompt file has no prompts for '{name}'; add `present` and `absent` sentences for it.")
        return {name: self.pairs[name] for name in findings or self.pairs}


def load_prompts(path: str | Path) -> Prompts:
    """Read a prompt file.

    Raises
    ------
    ConfigError
        It cannot be read, names an unknown finding, or a finding lacks one of its two sides.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
        tree = yaml.safe_load(content)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The prompt file {file} cannot be read ({type(error).__name__}); give one like configs/zero_shot.yaml."
        ) from error
    if not isinstance(tree, dict) or set(tree) != {"findings"} or not isinstance(tree["findings"], dict) or not tree["findings"]:
        raise ConfigError(f"The prompt file {file.name} must hold one key, 'findings', with a finding per line below it.")
    found = {name: _pair(name, pair, file.name) for name, pair in tree["findings"].items()}
    return Prompts({name: found[name] for name in FINDINGS if name in found}, hashlib.sha256(content).hexdigest())


def _pair(name: Any, pair: Any, file: str) -> PromptPair:
    if name not in FINDINGS:
        raise ConfigError(f"{file} has prompts for '{name}', which is no finding; expected some of: {', '.join(FINDINGS)}.")
    if not isinstance(pair, dict) or (extra := set(pair) - {*SIDES}):
        what = f"the unknown key '{sorted(map(str, extra))[0]}'" if isinstance(pair, dict) else "no mapping"
        raise ConfigError(f"{file}, '{name}': {what}; expected `present` and `absent`, each a list of sentences.")
    for side in SIDES:
        sentences = pair.get(side)
        if not isinstance(sentences, list) or not sentences or not all(isinstance(each, str) and each.strip() for each in sentences):
            raise ConfigError(f"{file}, '{name}': the {side} prompt is missing; give a list of at least one sentence.")
    return PromptPair(tuple(pair["present"]), tuple(pair["absent"]))


def embed_prompts(loaded: LoadedModel, pairs: dict[str, PromptPair], side: str) -> NDArray[np.float32]:
    """[findings, T] the normalised mean of each finding's sentences of one side; see `embed_texts` for the error."""
    rows = [embed_texts(loaded, getattr(pair, side), f"{name}, {side}").mean(0) for name, pair in pairs.items()]
    means = np.stack(rows)
    normalised: NDArray[np.float32] = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-8)
    return normalised
