"""Who is told about a run: the protocol, and the reporters that need no Ray.

A record is a flat dict. Every rank makes the same calls in the same order with the same (rank-averaged) values, so that a reporter
may hold a barrier; writing is the business of rank 0.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from ssacl.progress import ProgressBar

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]


class Reporter(Protocol):
    """What the loop tells."""

    def progress(self, record: Record) -> None:
        """Every `run.log_every_steps` steps: `event` "step", stage, step, run_step (over all stages), losses, images_per_s ..."""

    def milestone(self, record: Record) -> None:
        """A validation (`event` "validation"), a stage's end ("stage_end"), the model's place ("model")."""


class LiveLine:
    """Records as one live line per stage where stderr is a terminal, as log lines elsewhere."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None
        self._stage, self._step = -1, 0
        self._terminal = sys.stderr.isatty()

    def show(self, record: Record) -> None:
        if not self._terminal or record["event"] != "step":
            logger.info("%s", describe(record))
            return
        if self._bar is None or record["stage_index"] != self._stage:
            self.close()
            self._stage, self._step = record["stage_index"], 0
            self._bar = ProgressBar(record["stage"], total=record["num_steps"], unit="steps")
            self._bar.__enter__()
        self._bar.advance(record["step"] - self._step, note=describe(record).partition(" | ")[2])
        self._step = record["step"]

    def close(self) -> None:
        """Take the line off the terminal."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


class LogReporter:
    """A `LiveLine` on rank 0."""

    def __init__(self, world_rank: int = 0) -> None:
        self._line = LiveLine() if world_rank == 0 else None

    def progress(self, record: Record) -> None:
        if self._line is not None:
            self._line.show(record)

    def milestone(self, record: Record) -> None:
        self.progress(record)

    def close(self) -> None:
        if self._line is not None:
            self._line.close()


def describe(record: Record) -> str:
    """One line for people: stage, step, losses, speed, wait for data, share of the hardware's peak, memory, time left."""
    head = f"{record.get('stage', 'run')} {record.get('event', '')}".rstrip()
    if "step" in record:
        head = f"{record['stage']} {record['step']}/{record['num_steps']}"
        if record["event"] == "validation":
            head += " validation"
    losses = " ".join(f"{_short(name)} {value:.3f}" for name, value in record.get("losses", {}).items() if "/" not in name)
    parts = [head, losses]
    if "images_per_s" in record:
        speed = f"{record['images_per_s']:.0f} images/s, data wait {100 * record['data_wait_share']:.0f} %"
        parts.append(f"{speed}, MFU {100 * record['mfu_share']:.0f} %, {record['memory_gib']:.1f} GiB, lr {record['lr']:.1e}")
    if record.get("checkpoint_stall_s"):
        parts.append(f"{record['checkpoint_stall_s']:.2f} s for a checkpoint")
    if "remaining_s" in record:
        parts.append(f"{_duration(record['remaining_s'])} left in this stage")
    if "note" in record:
        parts.append(str(record["note"]))
    return " | ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _short(name: str) -> str:
    return {
        "image_reconstruction": "ir",
        "global_contrastive": "cl",
        "language_model": "lm",
        "anatomy_reconstruction": "ar",
        "anatomical_consistency": "ac",
    }.get(name, name)


class MetricsLog:
    """The run's records as JSON lines: kept in memory on rank 0 and stored whole, atomically, at every checkpoint.

    Units are part of the names (`_s`, `_per_s`, `_share`); losses are plain means.
    """

    KEY = "metrics.jsonl"

    def __init__(self, records: list[dict[str, Any]] | None = None) -> None:
        self.records = records if records is not None else []

    @classmethod
    def parse(cls, content: bytes) -> MetricsLog:
        """Read what `dump` gave."""
        return cls([json.loads(line) for line in content.decode("utf-8").splitlines() if line.strip()])

    def add(self, record: Record) -> None:
        self.records.append(dict(record))

    def validations(self) -> list[dict[str, Any]]:
        """The records of validations, in order."""
        return [record for record in self.records if record["event"] == "validation"]

    def dump(self) -> bytes:
        return "".join(json.dumps(record) + "\n" for record in self.records).encode("utf-8")

    def rewind(self, stage_index: int, step: int) -> None:
        """Forget what was told after a position from which the run is taken up again."""
        self.records = [
            record
            for record in self.records
            if (record.get("stage_index", 0), record.get("step", 0)) <= (stage_index, step)
            and not (record.get("event") == "stage_end" and record.get("stage_index", 0) >= stage_index)
        ]
