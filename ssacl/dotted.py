"""Dotted keys, such as losses.mask_ratio, in a plain configuration tree."""

from __future__ import annotations

from typing import Any

import yaml

from ssacl.errors import ConfigError


def find(tree: Any, key: str, who: str) -> Any:
    """The value at a key; `who` asks for it, for the error's text.

    Raises
    ------
    ConfigError
        There is no such key.
    """
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            known = f" Known keys there: {', '.join(tree)}." if isinstance(tree, dict) else ""
            raise ConfigError(f"{who} names '{key}', but the training configuration has no '{part}' there.{known}")
        tree = tree[part]
    return tree


def put(tree: dict[str, Any], key: str, value: Any, who: str) -> None:
    """Replace the value at a key that is there; errors as `find`."""
    find(tree, key, who)
    section, _, last = key.rpartition(".")
    (find(tree, section, who) if section else tree)[last] = value


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `key=value`, the value read as YAML; sections that are missing are made.

    Raises
    ------
    ConfigError
        It is no override, or a section on the way is a value.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"'{override}' is not an override; write section.key=value, as in optim.lr=1e-4.")
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"'{key}' does not lead to a key: '{section}' is a value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of '{key}' is not valid YAML: {text}") from error
    tree[last] = yaml_number(value)


def yaml_number(value: Any) -> Any:
    """`value`, or the number that it is meant to be: YAML 1.1 reads "1e-4" (no dot) as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
