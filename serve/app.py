"""The Ray Serve application: `build_app(settings)` for config files and tests, `run_server` / `stop_server` for the command.

Two deployments: the ingress reads uploads and draws pictures, the model replicas write reports. They scale apart.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from ray_jobs.session import ray_session, storage_environment
from serve.admission import Admission
from serve.ingress import build_api
from serve.problems import OverloadedError
from serve.replica import ModelReplica
from serve.replica_log import join_replica_log
from serve.settings import ServeSettings
from ssacl.data.dicom import Picture
from ssacl.errors import CheckpointError, ServeError
from ssacl.inference.report import DraftReport
from ssacl.registry.addresses import resolve_model

__all__ = ["RunningServer", "build_app", "run_server", "stop_server"]

logger = logging.getLogger(__name__)
APPLICATION = "ssacl"
_LOST = (RayActorError, WorkerCrashedError, NodeDiedError, ObjectLostError)
"""A replica or its node is gone, and the answer with it."""
_ATTEMPTS = 2


@serve.ingress()
class ReportIngress:
    """The HTTP interface, with a handle to the model replicas."""

    def __init__(self, model: DeploymentHandle, settings: dict[str, Any]) -> None:
        self._model = model
        self._settings = ServeSettings.parse(settings)
        self._admission = Admission(self._settings.latency_target_s, first_limit=2 * self._settings.max_batch_size)

    def __serve_build_asgi_app__(self) -> Any:
        join_replica_log()
        return build_api(self, self._settings)

    async def report(self, picture: Picture, model: str | None = None) -> DraftReport:
        if not self._admission.enter():
            raise OverloadedError
        started = time.monotonic()
        try:
            draft: DraftReport = await _answer(lambda: self._model.report.remote(picture, model))
        finally:
            self._admission.leave(time.monotonic() - started)
        return draft

    async def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = await _answer(self._model.describe.remote)
        return described

    async def describe_all(self) -> list[dict[str, Any]]:
        described: list[dict[str, Any]] = await _answer(self._model.describe_all.remote)
        return described


async def _answer(ask: Callable[[], DeploymentResponse]) -> Any:
    """What a model replica answers; a replica that dies meanwhile has changed nothing, so another one is asked.

    Raises
    ------
    OverloadedError
        No replica takes the request.
    ServeError
        Each replica that had it died: perhaps by this very request, so it is not handed on for ever.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return await ask()
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise OverloadedError from error
        except _LOST as error:
            logger.warning("a model replica died with a request (attempt %d of %d)", attempt, _ATTEMPTS)
            lost = error
    raise ServeError(f"{_ATTEMPTS} model replicas died with this request. Ray's logs of the replicas say why.") from lost


def build_app(settings: ServeSettings | dict[str, Any]) -> Application:
    """The application, bound and ready for `serve.run` or a Serve config file (`import_path: serve.app:build_app`).

    Serve takes a builder of one parameter only. Model replicas reach object storage by the variables of their node.

    Raises
    ------
    ConfigError
        A setting is unknown or out of range.
    """
    return _application(settings, {})


def _application(settings: ServeSettings | dict[str, Any], environment: dict[str, str]) -> Application:
    """The same, with variables that the model replicas need on top of their node's (object storage)."""
    settings = ServeSettings.parse(settings)
    # The models stand in `user_config` alone, so that another model is no reason to start replicas anew.
    tree = settings.model_dump(mode="json", exclude={"checkpoint_url", "more_models"}) | {"checkpoint_url": "that of the model replicas"}
    model = serve.deployment(
        name="model",
        # Twice the batch, so that the next batch gathers while one is being read.
        max_ongoing_requests=2 * settings.max_batch_size,
        max_queued_requests=settings.max_queued_requests,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": max(settings.min_replicas, settings.max_replicas),
            "target_ongoing_requests": settings.scale_above,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
        },
        ray_actor_options={
            "num_cpus": settings.cpus_per_replica,
            "num_gpus": settings.gpus_per_replica,
            "runtime_env": {"env_vars": environment},
        },
        user_config=settings.of_the_models(),
        graceful_shutdown_timeout_s=settings.drain_s,
        health_check_timeout_s=60,
    )(ModelReplica)
    ingress = serve.deployment(
        name="ingress",
        num_replicas=settings.num_ingress_replicas,
        # Above what waits for the model, so that overload is answered with 503 here and does not pile up in the proxy.
        max_ongoing_requests=2 * settings.max_queued_requests,
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=settings.drain_s,
    )(ReportIngress)
    device = "cuda" if settings.gpus_per_replica > 0 else "cpu"
    replica = model.bind(settings.num_threads, device, 2 * settings.request_timeout_s)
    application: Application = ingress.bind(replica, tree)
    return application


class RunningServer:
    """A started endpoint; as a context manager it is stopped at the end of the block."""

    def __init__(self, url: str) -> None:
        self.url = url

    def stop(self) -> None:
        """See `stop_server`."""
        stop_server()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run_server(settings: ServeSettings, blocking: bool = True) -> RunningServer:
    """Start the endpoint and wait until it is ready.

    Parameters
    ----------
    settings
        `host` and `port` are honoured when this call starts Ray Serve; port 0 takes a free one.
    blocking
        Serve until SIGINT or SIGTERM, then stop what was started here; else return when ready.

    Raises
    ------
    ConfigError
        Other machines would be served without access control.
    ServeError
        The port is taken, or the application does not become ready.
    CheckpointError
        There is no model folder at the address.
    """
    from ray.serve.config import HTTPOptions

    settings.service.check_exposure(settings.host)
    settings = _with_absolute_checkpoint(settings)
    port = _checked_port(settings.host, settings.port)
    address = f"http://{settings.host}:{port}"
    _session.enter_context(ray_session())
    # From here on, not from the moment it is ready: a signal may come while replicas start, and readers see them ready before we do.
    signals = _StopSignals() if blocking else None
    try:
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=settings.host, port=port))
        serve.run(_application(settings, storage_environment()), name=APPLICATION, route_prefix="/")
    except (RuntimeError, TimeoutError) as error:
        stop_server()
        raise ServeError(
            f"The endpoint did not become ready with the model at {settings.checkpoint_url}. Check it with `ssacl checkpoint show`; "
            "the replica's log is in Ray's session folder (serve/)."
        ) from error
    except _StopRequested:
        logger.info("stopped before the endpoint was ready")
        stop_server()
        return RunningServer(address)
    except BaseException:
        stop_server()
        raise
    logger.info("serving %s at %s/v1/reports", settings.checkpoint_url, address)
    if signals is not None:
        signals.wait()
        stop_server()
    return RunningServer(address)


def stop_server() -> None:
    """Drain and stop the application, and Ray where `run_server` started it."""
    import ray

    if ray.is_initialized():
        serve.shutdown()
    _session.close()


_session = contextlib.ExitStack()


def _with_absolute_checkpoint(settings: ServeSettings) -> ServeSettings:
    """Replicas run in other folders; and a missing model should fail here, in one line, not in a replica's log."""
    address = settings.checkpoint_url
    # Replicas get the address itself: they follow the channel of a registry.
    model_url = resolve_model(address)
    if "://" not in model_url and not (Path(model_url) / "manifest.json").is_file():
        raise CheckpointError(f"{address} is not a model folder: it has no manifest.json. Give the folder that `ssacl train` printed.")
    return settings if "://" in address else settings.model_copy(update={"checkpoint_url": os.path.abspath(address)})


def _checked_port(host: str, port: int) -> int:
    """`port`, or a free one for 0."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return int(probe.getsockname()[1])
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServeError(f"Port {port} on {host} is taken; choose another with --port.") from error
            raise ServeError(
                f"Cannot listen on {host}:{port} ({os.strerror(error.errno or 0)}); choose others with --host and --port."
            ) from error


class _StopRequested(BaseException):
    """A stop signal while the endpoint starts."""


class _StopSignals:
    """SIGINT and SIGTERM as a request to stop: at once while the endpoint starts, at the next look while it serves."""

    def __init__(self) -> None:
        self._stopped, self._waiting = threading.Event(), False
        # `ray_session` puts the former handlers back when it ends.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = not self._stopped.is_set()
        self._stopped.set()
        # A second signal must not break off the clean stop that the first one began.
        if first and not self._waiting:
            raise _StopRequested

    def wait(self) -> None:
        """Until a signal has come."""
        self._waiting = True
        while not self._stopped.wait(1.0):
            pass
