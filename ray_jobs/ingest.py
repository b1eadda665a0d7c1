"""Ingest on Ray: each task turns a chunk of studies into one finished shard; the driver commits the index last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ray_jobs.session import ray_session, storage_environment
from ssacl.data.chunks import Chunk, Made, run_chunk
from ssacl.data.convert import IngestSettings
from ssacl.data.ingest import IngestSummary, ingest
from ssacl.data.sources import SourceOptions
from ssacl.errors import SSACLError


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
        As `ssacl.data.ingest.ingest`; or Ray cannot be reached.
    """

    def run(chunks: Sequence[Chunk]) -> Iterator[Made]:
        # Here, not around the whole: a second run with nothing to do needs no Ray.
        with ray_session(num_workers, address):
            yield from _run_tasks(chunks, data_url, settings, num_workers)

    return ingest(format, source_path, data_url, settings, options, run, progress)


def _run_tasks(chunks: Sequence[Chunk], data_url: str, settings: IngestSettings, num_workers: int) -> Iterator[Made]:
    import ray

    task = ray.remote(num_cpus=1, max_retries=3, runtime_env={"env_vars": storage_environment()})(run_chunk)
    waiting = list(reversed(chunks))
    running: list[ray.ObjectRef] = []
    try:
        while waiting or running:
            # Bounded: chunks hold report texts, and one submitted task too many keeps a core busy, not the memory.
            while waiting and len(running) < num_workers + 1:
                running.append(task.remote(waiting.pop(), data_url, settings))
            done, running = ray.wait(running, num_returns=1)
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                # What the task raised, by its own name; Ray's wrapper would show a stack trace.
                if isinstance(error.cause, SSACLError):
                    raise error.cause from None
                raise
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
