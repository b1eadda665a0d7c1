"""The search space: dotted keys of the training configuration, each with the values that it may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from ssacl.config import Config, parse_config
from ssacl.dotted import find, put, yaml_number
from ssacl.errors import ConfigError

_NOT_SEARCHED = ("run.name", "run.storage_url", "run.seed", "run.num_figure_films", "data.url", "data.tokenizer_url")
"""What names a trial, or the data that trials are compared on."""
_WHO = "The search space"


class Domain(BaseModel):
    """Values of one key: exactly one of the three forms."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_uniform: tuple[float, float] | None = None
    """(low, high), even on a logarithmic scale."""
    uniform: tuple[float, float] | None = None
    choice: tuple[Any, ...] | None = None

    @field_validator("choice")
    @classmethod
    def _reads_numbers(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return None if values is None else tuple(yaml_number(value) for value in values)

    @model_validator(mode="after")
    def _is_one(self) -> Domain:
        given = [name for name in ("log_uniform", "uniform", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("needs exactly one of log_uniform: [LOW, HIGH], uniform: [LOW, HIGH] and choice: [A, B, ...]")
        if self.choice is not None:
            if len({repr(value) for value in self.choice}) != len(self.choice) or len(self.choice) < 2:
                raise ValueError("choice needs two or more different values")
            return self
        low, high = self.ends
        if not low < high:
            raise ValueError(f"{given[0]} needs LOW < HIGH, not [{low:g}, {high:g}]; a value that is not searched belongs into the base")
        if self.log_uniform is not None and low <= 0:
            raise ValueError(f"log_uniform needs LOW > 0, not {low:g}; use uniform, or choice with 0 among the values")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """What has to be valid: both ends of a range, every value of a choice."""
        return self.log_uniform or self.uniform or self.choice or ()

    def contains(self, value: Any) -> bool:
        if self.choice is not None:
            return value in self.choice
        return isinstance(value, int | float) and self.ends[0] <= value <= self.ends[1]

    def at(self, share: float) -> Any:
        """The value at a share (0..1) of the domain."""
        if self.choice is not None:
            return self.choice[min(int(share * len(self.choice)), len(self.choice) - 1)]
        low, high = self.ends
        return self._inside(low * (high / low) ** share if self.log_uniform is not None else low + share * (high - low))

    def moved(self, value: Any, up: bool) -> Any:
        """A number times 1.25 or 0.8, within the domain; of a choice, the value after or before, and at an end the end itself."""
        if self.choice is None:
            return self._inside(value * (1.25 if up else 0.8))
        place = self.choice.index(value) + (1 if up else -1)
        return self.choice[min(max(place, 0), len(self.choice) - 1)]

    def _inside(self, value: float) -> float:
        return float(min(max(value, self.ends[0]), self.ends[1]))


Space = Mapping[str, Domain]


def look_up(config: Config, key: str) -> Any:
    """The value at a dotted key, as it stands in YAML.

    Raises
    ------
    ConfigError
        There is no such key.
    """
    return find(config.model_dump(mode="json"), key, _WHO)


def with_values(base: Config, values: Mapping[str, Any], same_sum: Sequence[str] = ()) -> Config:
    """`base` with some dotted keys replaced.

    Parameters
    ----------
    same_sum
        Keys that are then scaled together, so that their sum is what it is in `base`.

    Raises
    ------
    ConfigError
        A key is unknown, or the values contradict each other.
    """
    tree = base.model_dump(mode="json")
    for key, value in values.items():
        put(tree, key, value, _WHO)
    if same_sum:
        factor = sum(look_up(base, key) for key in same_sum) / sum(find(tree, key, _WHO) for key in same_sum)
        for key in same_sum:
            put(tree, key, factor * find(tree, key, _WHO), _WHO)
    return parse_config(tree)


def check_space(base: Config, space: Space, same_sum: Sequence[str]) -> None:
    """
    Raises
    ------
    ConfigError
        The space is empty, names what is not a key or may not be searched, holds a value that a key does not take, or `same_sum` holds
        what is no weight above 0.
    """
    if not space:
        raise ConfigError("The search space is empty: give at least one key, as in losses.global_contrastive: {log_uniform: [0.01, 1]}.")
    for key, domain in space.items():
        if key in _NOT_SEARCHED:
            raise ConfigError(f"'{key}' cannot be searched: it names a trial or its data. Take it out of the space.")
        if "." not in key or isinstance(look_up(base, key), dict):
            raise ConfigError(f"'{key}' is a section, not a key. Name the keys in it, as in losses.mask_ratio.")
        inside = [other for other in space if other.startswith(f"{key}.")]
        if inside:
            raise ConfigError(f"The search space names both '{key}' and '{inside[0]}', which is a part of it. Take one out.")
        for value in domain.ends:
            try:
                with_values(base, {key: value})
            except ConfigError as error:
                raise ConfigError(f"The search space gives '{key}' a value that it cannot take: {error}") from error
    for key in same_sum:
        value = look_up(base, key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"same_sum holds '{key}', whose base value is {value!r}: only numbers above 0 can keep their sum.")
        if key in space and any(not isinstance(end, int | float) or end <= 0 for end in space[key].ends):
            raise ConfigError(f"same_sum holds '{key}', so every value of it in the search space must be a number above 0.")
