"""DeepSpeed checkpoints for another number of ranks or another ZeRO stage, by DeepSpeed's universal layout: one file per parameter.

The layout is made when a run is resumed, and only where the split changed, so that saving costs nothing more.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from ssacl.distributed import world_rank
from ssacl.errors import CheckpointError
from ssacl.training.resume import gather_objects

logger = logging.getLogger(__name__)

_CONVERTED = "universal"


def convert_checkpoint(folder: Path) -> Path:
    """The universal layout of the DeepSpeed checkpoint `folder` (this rank's copy of it), made once per machine; called by all ranks.

    It lies beside the folder of the first rank of the machine, about as large as the checkpoint, whole or not at all.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be converted, or the disk is full; on every rank.
    """
    machine = socket.gethostname()
    places = gather_objects((machine, str(folder)))
    first = Path(next(place for name, place in places if name == machine))
    # Machines of one name that do not share a disk each convert for themselves.
    source = first if first.is_dir() else folder
    failure = ""
    if source == folder:
        try:
            _convert(folder, folder.parent / _CONVERTED)
        except OSError as error:
            failure = f"{error.strerror}; it needs about as much room beside the checkpoint as that takes"
        except Exception as error:  # the converter raises whatever its parts do, asserts included
            failure = f"{type(error).__name__}"
            logger.info("rank %d: the converter failed", world_rank(), exc_info=error)
    failures = [text for text in gather_objects(failure) if text]
    if failures:
        raise CheckpointError(
            f"The checkpoint cannot be spread over another number of train workers or another engine.zero_stage ({failures[0]}). "
            "Run with those that wrote it, or start a new run.name."
        )
    return source.parent / _CONVERTED


def _convert(folder: Path, into: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    work = into.with_suffix(".partial")
    shutil.rmtree(work, ignore_errors=True)
    # One process: forking after the process group exists may hang.
    options = SimpleNamespace(
        input_folder=str(folder),
        output_folder=str(work),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        ds_to_universal.main(options)
    os.replace(work, into)
