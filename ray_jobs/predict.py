"""`ssacl predict`: draft reports for files and folders, in this process or on Ray actors. One result or one named reason for each input."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_jobs.session import ray_session, storage_environment
from ssacl.errors import CheckpointError, DataError, SSACLError
from ssacl.inference.files import Outcome, Predictor, already_done, find_inputs, open_out_folder, write_tables
from ssacl.inference.generator import GenerationOptions
from ssacl.progress import ProgressBar
from ssacl.registry.addresses import resolve_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictSummary:
    """Counts of a run; `outcomes` in the order of the inputs."""

    out_folder: Path
    outcomes: tuple[Outcome, ...]
    num_resumed: int

    @property
    def num_results(self) -> int:
        return sum(not outcome.reason for outcome in self.outcomes)

    @property
    def num_rejects(self) -> int:
        return len(self.outcomes) - self.num_results

    def describe(self) -> str:
        """One paragraph for the terminal."""
        lines = [f"{self.num_results} drafts and {self.num_rejects} rejects of {len(self.outcomes)} inputs in {self.out_folder}"]
        if self.num_resumed:
            lines.append(f"{self.num_resumed} were there already.")
        if self.num_rejects:
            lines.append(f"Reasons: {self.out_folder / 'rejects.jsonl'}; which file: {self.out_folder / 'inputs.csv'}.")
        return "\n".join(lines)


def run_predict(
    checkpoint_url: str,
    inputs: Sequence[str | Path],
    out_folder: str | Path,
    options: GenerationOptions | None = None,
    num_workers: int = 1,
    progress: bool = False,
    overlays: bool = False,
    device: str = "cpu",
) -> PredictSummary:
    """Write a draft report for every picture among `inputs`; run again, it does only what is missing.

    Parameters
    ----------
    checkpoint_url
        Model folder, or s3:// prefix of one.
    inputs
        Files, and folders that are searched for DICOM, PNG and JPEG.
    out_folder
        Made if absent. Results of another model in it are an error.
    options
        Search settings of the generator.
    num_workers
        More than 1: that many Ray actors.
    overlays
        Also write an evidence sheet per draft.

    Raises
    ------
    DataError
        An input does not exist, there is none, or `out_folder` holds drafts of another model.
    CheckpointError
        The model cannot be loaded.
    StorageError
        The disk refuses.
    """
    options, out = options or GenerationOptions(), Path(out_folder)
    paths = [str(path) for path in find_inputs(inputs)]
    if not paths:
        raise DataError("No DICOM, PNG or JPEG file among the inputs. Give files, or folders that hold some.")
    # Once: a channel that moves meanwhile must not put drafts of two models into one folder.
    checkpoint_url = resolve_model(checkpoint_url)
    open_out_folder(out, checkpoint_url, options)
    done = {path: outcome for path in paths if (outcome := already_done(out, path, overlays)) is not None}
    missing = [path for path in paths if path not in done]
    chunks = [missing[start : start + options.max_batch_size] for start in range(0, len(missing), options.max_batch_size)]
    outcomes = dict(done)
    arguments = (checkpoint_url, str(out.resolve()), options, overlays, device)
    with ProgressBar("predict", total=len(paths), unit="images") as bar:
        if progress:
            bar.advance(len(done), note=f"{len(done)} resumed" if done else None)
        for batch in _run(arguments, chunks, num_workers):
            outcomes |= {outcome.path: outcome for outcome in batch}
            if progress:
                bar.advance(len(batch), note=f"{sum(bool(outcome.reason) for outcome in outcomes.values())} rejects")
    ordered = tuple(outcomes[path] for path in paths)
    write_tables(out, ordered)
    return PredictSummary(out, ordered, len(done))


def _run(arguments: tuple[Any, ...], chunks: list[list[str]], num_workers: int) -> Iterator[list[Outcome]]:
    if not chunks:
        return
    if num_workers <= 1:
        predictor = Predictor(*arguments)
        for chunk in chunks:
            yield predictor.predict(chunk)
        return
    import ray
    from ray.exceptions import ActorDiedError, RayTaskError
    from ray.util import ActorPool

    with ray_session(num_cpus=max(num_workers, 1)):
        # Started again after a crash; the chunk that it was at is done again, which overwrites files with the same content.
        actor = ray.remote(num_cpus=1, max_restarts=2, max_task_retries=2, runtime_env={"env_vars": storage_environment()})(Predictor)
        actors = [actor.remote(*arguments) for _ in range(min(num_workers, len(chunks)))]
        pool = ActorPool(actors)
        try:
            yield from pool.map_unordered(lambda worker, chunk: worker.predict.remote(chunk), chunks)
        except RayTaskError as error:
            if isinstance(error.cause, SSACLError):
                raise error.cause from error
            raise
        except ActorDiedError as error:
            raise CheckpointError("No prediction worker could start or stay alive. Run with --num-workers 1 to see why.") from error
        finally:
            for worker in actors:
                ray.kill(worker)
