"""Which of the annotated films a checkpoint was trained on: found by the digest of their pixels in its data set's training split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ssacl.data.loader import open_split
from ssacl.data.shards import ShardIndex, read_sample
from ssacl.data.storage import open_storage
from ssacl.errors import DataError, SSACLError
from ssacl.evaluation.film_answers import film_digest
from ssacl.evaluation.predictions import sample_digest
from ssacl.training.checkpoint import LoadedModel

POLICIES = ("refuse", "leave-out", "mark")
AnyFilm = TypeVar("AnyFilm")


@dataclass(frozen=True)
class Seen:
    """What is known of the training films."""

    checked: bool
    """Was the checkpoint's data set at hand? If not, nobody knows."""
    rows: tuple[int, ...]
    """Indices of the films that were trained on."""
    how: str
    """A sentence for the card."""


def seen_in_training(
    loaded: LoadedModel, films: Sequence[AnyFilm], trained_on: str = "", digest: Callable[[Any], str] = film_digest
) -> Seen:
    """Look the films up in the training split of the checkpoint's data set.

    Parameters
    ----------
    trained_on
        Where that data set lies now; where the checkpoint's configuration says, if empty.
    digest
        Gives a film's digest.

    Raises
    ------
    DataError, StorageError
        `trained_on` is no data set, or not the one that the checkpoint's manifest names.
    """
    named = loaded.manifest.get("provenance", {}).get("data_sha256", "")
    if not named and not trained_on:
        return Seen(False, (), "The checkpoint does not say what it was trained on: films may have been seen in training.")
    url = trained_on or loaded.config.data.url
    try:
        storage = open_storage(url)
        index = ShardIndex.load(storage)
        if named and index.digest != named:
            raise DataError("The data set of --trained-on is not the one that the checkpoint's manifest names by its hash; give that one.")
        entries = open_split(storage, "train", purpose="evaluation")
    except (SSACLError, OSError):
        if trained_on:
            raise
        return Seen(False, (), "The checkpoint's data set is not at hand (--trained-on URL): films may have been seen in training.")
    with ThreadPoolExecutor(8) as pool:
        trained = set(pool.map(lambda entry: sample_digest(read_sample(storage, entry)), entries)) - {""}
    rows = tuple(row for row, film in enumerate(films) if digest(film) in trained)
    return Seen(True, rows, f"{len(rows)} of {len(films)} annotated films are among the {len(entries)} of the training split.")


def allowed_films(films: Sequence[AnyFilm], seen: Seen, policy: str) -> list[AnyFilm]:
    """The films that may be scored under a policy of `POLICIES`.

    Raises
    ------
    DataError
        Some were trained on and the policy refuses them, or none is left.
    """
    if not seen.rows or policy == "mark":
        return list(films)
    if policy == "refuse":
        raise DataError(
            f"{len(seen.rows)} of {len(films)} annotated films are in the checkpoint's training split. Leave them out with "
            "--trained-films leave-out, or score them and have the card say so with --trained-films mark."
        )
    kept = [film for row, film in enumerate(films) if row not in set(seen.rows)]
    if not kept:
        raise DataError("Every annotated film is in the checkpoint's training split, so that none is left to score.")
    return kept
