"""Ingest on Ray Data: each task turns a chunk of studies into one finished shard; the driver commits the index last."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ray_jobs.session import ray_session, storage_environment
from ssacl.data.chunks import Chunk, Made, run_chunk
from ssacl.data.convert import IngestSettings
from ssacl.data.ingest import IngestSummary, ingest
from ssacl.data.sources import SourceOptions
from ssacl.errors import SSACLError

_NUM_RETRIES = 3


def run_ingest(
    format: str,
    source_path: str | Path,
    data_url: str,
    settings: IngestSettings,
    options: SourceOptions | None = None,
    num_workers: int = 2,
    progress: bool = True,
    address: str | None = None,
) -> IngestSummary:
    """Ingest with `num_workers` tasks at a time, in the running Ray, the cluster at `address`, or a local one.

    Raises
    ------
    SSACLError
        As `ssacl.data.ingest.ingest`; or Ray cannot be reached, or loses its workers.
    """

    def run(chunks: Sequence[Chunk]) -> Iterator[Made]:
        # Here, not around the whole: a second run with nothing to do needs no Ray.
        with ray_session(num_workers, address):
            yield from _run_dataset(chunks, data_url, settings, num_workers)

    return ingest(format, source_path, data_url, settings, options, run, progress)


def _run_dataset(chunks: Sequence[Chunk], data_url: str, settings: IngestSettings, num_workers: int) -> Iterator[Made]:
    import ray.data

    # Our own bar shows studies; Ray Data's shows blocks.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    # What goes wrong is raised here, in a line; Ray Data would print stacks before.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)

    def make(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"made": run_chunk(row["chunk"], data_url, settings)}
        except SSACLError as error:  # As a value: raised, it would come back wrapped, without its name.
            return {"made": error}

    # A block per chunk, so that a shard is told of as soon as it is there. A task that is lost with its worker is started again, since it
    # gives the same bytes; but not for ever, as Ray Data does by itself: a film may be what kills it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # No other argument sets the number of retries in this version of Ray.
        dataset = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks)).map(
            make,
            compute=ray.data.TaskPoolStrategy(size=num_workers),
            num_cpus=1,
            runtime_env={"env_vars": storage_environment()},
            ray_remote_args_fn=lambda: {"max_retries": _NUM_RETRIES},
        )
    try:
        for row in dataset.iter_rows():
            if isinstance(row["made"], SSACLError):
                raise row["made"]
            yield row["made"]
    except ray.exceptions.RayTaskError:
        raise  # A fault of our own, with its stack.
    except ray.exceptions.RayError as error:
        raise SSACLError(
            f"Ray lost the work of ingest ({type(error).__name__}; each shard was tried {_NUM_RETRIES + 1} times). Look at the memory of "
            "the machines and at Ray's logs, then run again: finished shards are kept."
        ) from error
