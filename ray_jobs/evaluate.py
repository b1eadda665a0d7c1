"""`ssacl evaluate reports`: scores a checkpoint on a split, in this process or on Ray actors, and writes the score card."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray_jobs.session import ray_session, storage_environment
from ssacl.errors import CheckpointError, SSACLError
from ssacl.evaluation.pairs_evaluation import write_up
from ssacl.evaluation.predictions import Predictions, Runner, SplitPredictor, Work
from ssacl.evaluation.scorecard import print_card
from ssacl.evaluation.study_set import evaluate_split, num_cases_to_answer
from ssacl.inference.generator import GenerationOptions
from ssacl.progress import ProgressBar

logger = logging.getLogger(__name__)


class ActorRunner:
    """A `Runner` over Ray actors that each hold the checkpoint. Use inside `ray_session`."""

    def __init__(self, checkpoint_url: str, data_url: str, num_workers: int) -> None:
        import ray

        # Started again after a crash; the chunk that it was at is done again.
        actor = ray.remote(num_cpus=1, max_restarts=2, max_task_retries=2, runtime_env={"env_vars": storage_environment()})(SplitPredictor)
        self._actors = [actor.remote(checkpoint_url, data_url) for _ in range(num_workers)]

    def describe(self) -> dict[str, Any]:
        """See `Runner`."""
        import ray

        description: dict[str, Any] = _named(lambda: ray.get(self._actors[0].describe.remote()))
        return description

    def run(self, work: Sequence[Work]) -> Iterator[Predictions]:
        """See `Runner`."""
        from ray.util import ActorPool

        pool = ActorPool(self._actors)
        results = pool.map_unordered(lambda actor, each: actor.predict.remote(each), work)
        while (part := _named(lambda: next(results, None))) is not None:
            yield part

    def sheets(self, work: Work) -> list[bytes]:
        """See `Runner`."""
        import ray

        drawn: list[bytes] = _named(lambda: ray.get(self._actors[0].sheets.remote(work)))
        return drawn

    def stop(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor)


def run_evaluation(
    checkpoint_url: str | Path,
    data_url: str | Path,
    *,
    split: str = "test",
    truth_folder: str | Path | None = None,
    out_folder: str | Path | None = None,
    limit: int | None = None,
    num_workers: int = 1,
    progress: bool = False,
    options: GenerationOptions | None = None,
    chexbert_folder: str | Path | None = None,
    meteor: bool = False,
) -> dict[str, Any]:
    """Evaluate, write the score card and what it rests on to `out_folder`, print the table; returns the card.

    Run again with the same `out_folder`, it makes only the drafts that are missing.

    Parameters
    ----------
    out_folder
        See `ssacl.evaluation.pairs_evaluation.write_up` for its files; none: nothing is kept.
    num_workers
        More than 1: that many Ray actors.
    progress
        Show a bar while the checkpoint answers, and the table at the end.
    chexbert_folder, meteor
        See `ssacl.evaluation.pairs_evaluation.evaluate_pairs`.

    Raises
    ------
    SSACLError
        As `ssacl.evaluation.study_set.evaluate_split`; or Ray cannot be started, or the card cannot be written.
    """
    checkpoint, data = _anywhere(checkpoint_url), _anywhere(data_url)
    total = num_cases_to_answer(data, split, limit, with_truth=truth_folder is not None)
    with ExitStack() as stack:
        out = out_folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="ssacl-evaluation-"))
        bar = stack.enter_context(ProgressBar("evaluate", total=total, unit="cases"))
        runner: Runner
        if num_workers <= 1:
            runner = SplitPredictor(checkpoint, data)
        else:
            stack.enter_context(ray_session(num_cpus=num_workers))
            runner = actors = ActorRunner(checkpoint, data, num_workers)
            stack.callback(actors.stop)
        evaluation = evaluate_split(
            *(checkpoint, data, split, truth_folder, limit, bar.advance if progress else None),
            options=options,
            runner=runner,
            chexbert_folder=chexbert_folder,
            out_folder=out,
        )
        card = write_up(evaluation, data, runner, chexbert_folder=chexbert_folder, meteor=meteor)
    if out_folder is not None:
        logger.info("score card: %s", Path(out_folder) / "scorecard.html")
    if progress:
        print_card(card)
    return card


def _anywhere(url: str | Path) -> str:
    """A URL, or a path that means the same in every process."""
    return str(url) if "://" in str(url) else str(Path(url).resolve())


def _named(ask: Any) -> Any:
    """An actor's answer, or its error by its own name."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ask()
    except RayTaskError as error:
        if isinstance(error.cause, SSACLError):
            raise error.cause from error
        raise
    except RayActorError as error:
        raise CheckpointError("No evaluation worker could start or stay alive. Run with --num-workers 1 to see why.") from error
