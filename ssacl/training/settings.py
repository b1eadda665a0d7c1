"""What of a configuration decides the numbers of a run: a run of one name may not change it half way."""

from __future__ import annotations

from typing import Any

from ssacl.config import Config

_MUST_AGREE = ("model", "losses", "optim")
"""Sections that a run may not change half way; of `run`, seed, stages and start; of `data`, all but where it lies and how it is read; of
`engine`, what decides the numbers: with a global batch size, neither ranks nor micro batch do."""
_DATA_MAY_DIFFER = (
    *("url", "tokenizer_url", "max_bad_samples", "num_loader_threads", "loader_kind"),
    *("prefetch_batches", "num_reader_threads", "read_ahead_mb", "cache_mb"),
)


def run_settings(config: Config, done: int | None = None) -> dict[str, Any]:
    """What decides the numbers of a run, as a plain tree; of its changes, those before `done` optimizer steps (none: all)."""
    tree = config.model_dump(mode="json")
    settings = {name: tree[name] for name in _MUST_AGREE}
    settings["run"] = {name: tree["run"][name] for name in ("seed", "stages", "init_from", "init_encoder_from")}
    changes = [change for change in tree["run"]["changes"] if done is None or change["after_steps"] < done]
    if changes:
        settings["run"]["changes"] = changes
    names = ("kind", "precision", "accumulation_steps", "global_batch_size")
    settings["engine"] = {name: tree["engine"][name] for name in names}
    if config.engine.global_batch_size == 0:
        settings["engine"]["micro_batch_size"] = config.engine.micro_batch_size
    settings["data"] = {name: value for name, value in tree["data"].items() if name not in _DATA_MAY_DIFFER}
    return settings
