"""The score card of a downstream task, in the form of `ssacl.evaluation.scorecard`: what was measured, on what, beside which baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from ssacl.errors import ConfigError
from ssacl.evaluation.downstream.areas import Figures, Intervals
from ssacl.evaluation.page import ShownCase, write_page
from ssacl.evaluation.predictions import describe_checkpoint
from ssacl.evaluation.scorecard import FORMAT, card_table, installed_versions, write_card
from ssacl.evaluation.trained_films import POLICIES, Seen, allowed_films, seen_in_training
from ssacl.training.checkpoint import LoadedModel, open_model

_PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn")


AnyFilm = TypeVar("AnyFilm")


def open_on(checkpoint_url: str | Path, device: str) -> LoadedModel:
    """`open_model` on a device that is known to be there.

    Raises
    ------
    ConfigError
        torch has no such device here.
    CheckpointError, StorageError
        See `open_model`.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"torch cannot use the device '{device}' here; give cpu, or one that `ssacl doctor` shows.") from error
    return open_model(checkpoint_url, device)


def unseen_films(
    loaded: LoadedModel,
    films: Sequence[AnyFilm],
    digest: Callable[[AnyFilm], str],
    data_sha256: str,
    policy: str,
    trained_on: str = "",
) -> tuple[tuple[AnyFilm, ...], dict[str, Any]]:
    """The films that may be scored under a policy of `trained_films.POLICIES`, and what the card says of them.

    Parameters
    ----------
    digest
        Gives a film's digest.
    data_sha256
        Digest of the ingested data set whose val or test split the films are; empty for other films.

    Raises
    ------
    ConfigError
        Unknown policy.
    DataError
        Some were trained on and the policy refuses them, or none is left.
    """
    if policy not in POLICIES:
        raise ConfigError(f"'{policy}' is no policy for films of the training split; choose one of: {', '.join(POLICIES)}.")
    if data_sha256 and data_sha256 == loaded.manifest.get("provenance", {}).get("data_sha256"):
        seen = Seen(True, (), "The checkpoint's own data set: only its training split was trained on.")
    else:
        seen = seen_in_training(loaded, films, trained_on, digest)
    kept = tuple(allowed_films(films, seen, policy))
    return kept, {"checked": seen.checked, "policy": policy, "num": len(seen.rows), "what": seen.how}


def make_task_card(
    task: str,
    loaded: LoadedModel,
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    metrics: Figures,
    intervals: Intervals,
    rows: Sequence[Mapping[str, Any]],
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """A plain JSON tree.

    Parameters
    ----------
    data
        With `sha256`, `split` and `num_cases`.
    settings
        Everything else that the figures depend on, the seed among it.
    rows
        `figure`, `model`, `baseline`, `baseline_name`: main figures.
    """
    return {
        "format": FORMAT,
        "task": task,
        **describe_checkpoint(loaded),
        "data": dict(data),
        **settings,
        "versions": installed_versions(_PACKAGES),
        "metrics": metrics,
        "intervals": {name: each for name, each in intervals.items() if each},
        "rows": [dict(row) for row in rows],
        "details": dict(details),
    }


def write_task_card(card: Mapping[str, Any], out_folder: str | Path, shown: Sequence[ShownCase] = ()) -> None:
    """Write `scorecard.html`, then `scorecard.json`, each whole or not at all."""
    Path(out_folder).mkdir(parents=True, exist_ok=True)
    write_page(card, shown, out_folder)
    write_card(card, out_folder)


def print_task_card(card: Mapping[str, Any], console: Console | None = None) -> None:
    """The card's table, and in a line what it was measured on."""
    target, data = console or Console(), card["data"]
    target.print(card_table(card))
    target.print(
        "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in card["in_short"].items()) + f"; data {data['sha256'][:12]}"
    )
