"""TensorBoard event files of a run, in its storage: `tensorboard --logdir <run.storage_url>/<run.name>/tensorboard`."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from ssacl.data.storage import FolderStorage, Storage
from ssacl.training.reporter import Record

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"
_FIGURES = ("images_per_s", "data_wait_share", "mfu_share", "memory_gib", "lr", "gradient_norm", "checkpoint_stall_s")


class EventFiles:
    """Scalars by steps over all stages. In a folder they grow live; object storage gets them whole, at every `store`.

    A resumed run writes a file of its own, which makes TensorBoard forget what an earlier one told of later steps.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage.sub(FOLDER)
        self._writer: Any = None
        self._missing = False
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        return self._storage.url

    def add(self, record: Record) -> None:
        """Write a record's losses and speeds; records without `run_step` are left out."""
        if "run_step" not in record:
            return
        step, kind = int(record["run_step"]), "validation" if record["event"] == "validation" else "training"
        if self._writer is None and not self._missing:
            self._open(step)
        if self._missing:
            return
        try:
            for name, value in record.get("losses", {}).items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            for name in _FIGURES:
                if name in record:
                    self._writer.add_scalar(f"step/{name}", record[name], step)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def store(self) -> None:
        """Put what was written into object storage."""
        if self._temporary is not None and self._writer is not None:
            for path in sorted(Path(self._temporary.name).iterdir()):
                self._storage.upload(path.name, path)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._give_up(error)
        if self._temporary is not None:
            self._temporary.cleanup()

    def _give_up(self, error: OSError) -> None:
        """Curves alone are no reason to stop a run: what it cannot do without says so itself."""
        logger.warning("no more TensorBoard files: %s", error.strerror)
        self._missing, self._writer = True, None

    def _open(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("no TensorBoard files: the package tensorboard is not installed (pip install 'ssacl[train]')")
            self._missing = True
            return
        if isinstance(self._storage, FolderStorage):
            folder = str(self._storage.root)
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="ssacl-events-")
            folder = self._temporary.name
        self._writer = SummaryWriter(folder, purge_step=step)
