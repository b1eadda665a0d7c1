"""Figures of a run for Prometheus, at Ray's own metrics port: what the alert rules and the training dashboard read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

RECORD_TIME, CHECKPOINT_TIME = "ssacl_train_last_record_time_seconds", "ssacl_train_last_checkpoint_time_seconds"
GAUGES = {
    "run_step": ("ssacl_train_step", "Optimizer steps over all stages."),
    "images_per_s": ("ssacl_train_images_per_second", "Images per second over all ranks."),
    "data_wait_share": ("ssacl_train_data_wait_share", "Share of the time spent waiting for data, 0..1."),
    "mfu_share": ("ssacl_train_mfu_share", "Share of the hardware's peak, 0..1."),
    "memory_gib": ("ssacl_train_memory_gib", "Peak memory of a rank's device, GiB."),
    "checkpoint_stall_s": ("ssacl_train_checkpoint_stall_seconds", "Time that training stood still for the last checkpoint."),
}
"""Field of a record -> name and description of its gauge."""
_TIMES = {RECORD_TIME: "Unix time of the last record.", CHECKPOINT_TIME: "Unix time of the last checkpoint that began."}


class TrainGauges:
    """The gauges of a run; they live as long as the actor that shows them."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        described = {**dict(GAUGES.values()), **_TIMES}
        self._gauges = {name: Gauge(name, description=text, tag_keys=("run",)) for name, text in described.items()}

    def show(self, record: Mapping[str, Any], now: float) -> None:
        """Set what a record tells; `now` is Unix time."""
        values = {name: record[field] for field, (name, _) in GAUGES.items() if field in record}
        values[RECORD_TIME] = now
        if record.get("checkpoint_stall_s"):
            values[CHECKPOINT_TIME] = now
        for name, value in values.items():
            self._gauges[name].set(float(value), tags=self._tags)
