"""Patients dealt into splits and label subsets: seeded, stratified by the rarest finding that a patient has, never a patient cut in two."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from ssacl.data.records import SPLITS
from ssacl.errors import ConfigError
from ssacl.evaluation.downstream.films import PRESENT, TaskFilm

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
"""Of the patients, where a layout brings no splits of its own."""
VAL_SHARE = 0.1
"""Of the patients of a layout's training list that are set apart for choosing."""


def split_patients(films: Sequence[TaskFilm], seed: int, shares: dict[str, float] | None = None) -> dict[str, tuple[TaskFilm, ...]]:
    """Deal films by patient into splits; films keep their order."""
    shares = shares or SHARES
    dealt: Counter[str] = Counter()
    split_of = {}
    # The strata one after the other, each patient to the split that lacks most: totals are exact, and every stratum is spread.
    for number, patient in enumerate((each for stratum in _strata(films, f"split|{seed}") for each in stratum), 1):
        split = max(shares, key=lambda name: (shares[name] * number - dealt[name], name))
        split_of[patient] = split
        dealt[split] += 1
    return {name: tuple(film for film in films if split_of[film.patient] == name) for name in SPLITS if name in shares}


def label_subset(films: Sequence[TaskFilm], percent: float, seed: int) -> tuple[TaskFilm, ...]:
    """The films of `percent` of the patients of each stratum, at least one; smaller subsets lie within larger ones of the same seed.

    Raises
    ------
    ConfigError
        `percent` is not in (0, 100].
    """
    if not 0 < percent <= 100:
        raise ConfigError(f"{percent:g} % is no share of labels; give numbers above 0 and up to 100, as in --labels 1,10,100.")
    kept: set[str] = set()
    for stratum in _strata(films, f"labels|{seed}"):
        # In whole thousandths of a per cent, so that 10 % of 10 patients is one patient and not a rounding error more.
        kept.update(stratum[: -(-len(stratum) * round(percent * 1000) // 100_000)])
    return tuple(film for film in films if film.patient in kept)


def _strata(films: Sequence[TaskFilm], salt: str) -> list[list[str]]:
    """Patients by their rarest finding, each stratum in an order of its own that other patients do not change."""
    count = Counter(column for film in films for column, label in enumerate(film.labels) if label == PRESENT)
    nothing = max(count.values(), default=0) + 1, -1
    rarest: dict[str, tuple[int, int]] = {}
    for film in films:
        present = [(count[column], column) for column, label in enumerate(film.labels) if label == PRESENT]
        rarest[film.patient] = min([*present, rarest.get(film.patient, nothing)])
    strata: dict[tuple[int, int], list[str]] = defaultdict(list)
    for patient, stratum in rarest.items():
        strata[stratum].append(patient)
    return [sorted(strata[name], key=lambda patient: hashlib.sha256(f"{salt}|{patient}".encode()).digest()) for name in sorted(strata)]
