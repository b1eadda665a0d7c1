"""Training on Ray: `ssacl.training.loop` in every worker of one Ray Train group, told live to the driver.

Checkpoints, metrics and the model go to `(run.storage_url, run.name)` by the loop itself; Ray Train starts the group, restarts it when
a worker dies (the loop then takes up its last checkpoint), and hears the metrics.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from ray_jobs.board import RayReporter, live_line, new_board, raise_named
from ray_jobs.elastic import FollowNodes, cancel_reservation, free_left_room, require_room, resources_per_worker, worker_counts
from ray_jobs.gpu_group import GpuConfig
from ray_jobs.session import ray_session, storage_environment
from ssacl.config import Config, parse_config
from ssacl.data.loader import open_split
from ssacl.data.storage import open_storage
from ssacl.errors import SSACLError, TrainingError
from ssacl.training.curves import write_curves
from ssacl.training.events import FOLDER
from ssacl.training.reporter import MetricsLog
from ssacl.training.resume import run_storage
from ssacl.training.sealed import MANIFEST
from ssacl.training.stages import require_findings_first

logger = logging.getLogger(__name__)

_ANSWER_S = 5.0
"""Longest time that the board may take to answer."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run left; the URLs lie in its storage, the paths on this machine."""

    model_url: str
    """Empty where the run ended before its last step, as it was told to."""
    metrics_path: Path
    curves_png: Path
    metrics: list[dict[str, Any]] = field(repr=False)


def run_training(
    config: Config,
    progress: bool = True,
    address: str | None = None,
    out_folder: Path | None = None,
    until_step: int | None = None,
) -> TrainingResult:
    """Run the stages of `config` with Ray Train; the same `(run.storage_url, run.name)` continues.

    Parameters
    ----------
    progress : show a live line.
    out_folder : where metrics.jsonl and training.png go on this machine; none: runs/<run.name>.
    until_step : as in `ssacl.training.loop.train`.

    Raises
    ------
    SSACLError
        As `ssacl.training.loop.train`; a worker's named error arrives by its name.
    """
    counts = worker_counts(config)
    storage = run_storage(config)
    # So that stages in a wrong order, storage that is down or refuses, and data that is not there, are told before any worker starts.
    require_findings_first(config)
    storage.exists(MetricsLog.KEY)
    open_split(open_storage(config.data.url), "train", purpose="training")
    folder = out_folder or Path("runs") / config.run.name
    num_cpus = max(os.cpu_count() or 1, math.ceil(counts[-1] * config.run.cpus_per_train_worker))
    with ray_session(num_cpus=num_cpus, address=address) as dashboard:
        if dashboard:
            logger.info("Ray dashboard: %s", dashboard)
        require_room(config, counts[0])
        _fit(config, counts, progress, until_step)
    metrics = MetricsLog.parse(storage.read(MetricsLog.KEY))
    folder.mkdir(parents=True, exist_ok=True)
    metrics_path, curves = folder / "metrics.jsonl", folder / "training.png"
    metrics_path.write_bytes(metrics.dump())
    write_curves(metrics.records, curves)
    storage.upload("training.png", curves)
    logger.info(
        "metrics and curves in %s; tensorboard --logdir %s%s",
        folder,
        storage.sub(FOLDER).url,
        f"; Ray dashboard: {dashboard}" if dashboard else "",
    )
    model_url = storage.sub("model").url if storage.exists(f"model/{MANIFEST}") else ""
    return TrainingResult(model_url, metrics_path, curves, metrics.records)


def _fit(config: Config, counts: tuple[int, ...], progress: bool, until_step: int | None) -> None:
    board = new_board(config.run.name)
    with (
        tempfile.TemporaryDirectory(prefix="ssacl-ray-train-") as folder,
        live_line(board, progress),
        _quiet_ray(),
        _own_interrupt(),
    ):
        for _ in range(config.run.max_restarts + 1):
            trainer = _trainer(config, counts, board, folder, until_step)
            try:
                trainer.fit()
                break
            except RayActorError:
                # What the train workers die of is another error: this is the controller, whose workers end with it.
                _raise_named(board)
                free_left_room()
                cancel_reservation(trainer.train_run_context.run_id)
                board.post.remote({"event": "restart", "note": "Ray Train's controller was lost and is started again"})
            except Exception as error:
                _raise_named(board)
                causes = getattr(error, "worker_failures", None) or {0: error}
                first = "; ".join(sorted({_last_line(cause) for cause in causes.values()}))
                raise TrainingError(
                    f"A train worker was lost more than {config.run.max_restarts} times, or failed without a named cause: {first}. "
                    "Look into Ray's logs (ray logs), then run the same command again: it continues at the last checkpoint."
                ) from error
        else:
            raise TrainingError(
                f"Ray Train's controller was lost more than {config.run.max_restarts} times. Look whether this machine runs out of memory, "
                "and into Ray's logs (ray logs), then run the same command again: it continues at the last checkpoint."
            )
        raise_named(board)


def _raise_named(board: Any) -> None:
    # Asked for the board, Ray would start again by itself.
    if not ray.is_initialized():
        raise TrainingError("Ray was shut down during the run. Run the same command again: it continues at the last checkpoint.")
    raise_named(board)


def _trainer(config: Config, counts: tuple[int, ...], board: Any, folder: str, until_step: int | None) -> _Trainer:
    elastic = not isinstance(config.run.num_train_workers, int)
    scaling = ray.train.ScalingConfig(
        num_workers=(counts[0], counts[-1]) if elastic else counts[0],
        use_gpu=config.run.use_gpu,
        resources_per_worker=resources_per_worker(config),
        elastic_resize_monitor_interval_s=config.run.resize_check_s,
    )
    trainer = _Trainer(
        train_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "board": board, "until_step": until_step},
        torch_config=GpuConfig(backend="nccl", board=board) if config.run.use_gpu else TorchConfig(backend="gloo"),
        scaling_config=scaling,
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=folder,
            failure_config=ray.train.FailureConfig(max_failures=config.run.max_restarts),
            worker_runtime_env={"env_vars": storage_environment()},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    trainer.policies = {"failure_policy": NamedIsFinal(trainer.run_config.failure_config, board)}
    if elastic:
        trainer.policies["scaling_policy"] = FollowNodes(scaling, counts, board)
    return trainer


class NamedIsFinal(DefaultFailurePolicy):
    """No group is started again once a train worker has told `board` a named error."""

    def __init__(self, failure_config: ray.train.FailureConfig, board: Any) -> None:
        super().__init__(failure_config)
        self._board = board

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        decision = super().make_decision(training_failed_error)
        try:
            named = ray.get(self._board.failure.remote(), timeout=_ANSWER_S) is not None
        except (RayError, TimeoutError):
            # Looked at again by each train worker of the next group.
            named = False
        return FailureDecision.RAISE if named else decision


class _Trainer(TorchTrainer):
    policies: dict[str, Any]
    """In place of Ray's own."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        # Each costs an actor, and seconds: Ray's datasets are not used here, and `free_left_room` removes placement groups.
        needless = (DatasetsCallback, PlacementGroupCleanerCallback)
        parts["callbacks"] = [callback for callback in parts["callbacks"] if not isinstance(callback, needless)]
        return super()._initialize_and_run_controller(**parts | self.policies)

    def _register_sigint_handler(self, controller: Any) -> None:
        # Ray's handler ends the process behind the caller's back, with exit code 1, and stays after the run. Without it Ctrl-C is the
        # usual KeyboardInterrupt here; the actors of the run end with the Ray session, or with this driver where a cluster was joined.
        return


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Whatever Ray does to SIGINT inside the block, outside of it is as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, handler)


def train_worker(settings: dict[str, Any]) -> None:
    """What each train worker runs. A named error is final: it is told to the driver, and a restarted group stops at once."""
    import torch
    from ray.train.torch import get_device

    from ssacl.training.loop import train

    board, config = settings["board"], parse_config(settings["config"])
    if ray.get(board.failure.remote()) is not None:
        return
    context = ray.train.get_context()
    device = get_device() if config.run.use_gpu else torch.device("cpu")
    if not config.run.use_gpu:
        torch.set_num_threads(max(1, int(config.run.cpus_per_train_worker)))
    try:
        rank, size = context.get_world_rank(), context.get_world_size()
        train(config, RayReporter(board, rank), rank, size, device, settings["until_step"])
    except SSACLError as error:
        ray.get(board.fail.remote(type(error).__name__, str(error)))
        raise


@contextlib.contextmanager
def _quiet_ray() -> Iterator[None]:
    """Ray Train's own log lines only when something is wrong; its failures reach the user as one named error."""
    ray_logger = logging.getLogger("ray.train")
    level = ray_logger.level
    ray_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray_logger.setLevel(level)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
