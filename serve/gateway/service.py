"""The gateway as a whole: receiver, spool and couriers, from one configuration."""

from __future__ import annotations

import logging
import signal
import threading
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from types import FrameType

from serve.audit import SECURITY_ALERT, AuditLog, Event
from serve.gateway.config import GatewayConfig
from serve.gateway.courier import Courier
from serve.gateway.delivery import Sender, open_sender
from serve.gateway.endpoint import ReportClient
from serve.gateway.intake import Intake
from serve.gateway.metrics import GatewayMetrics, MetricsServer
from serve.gateway.receiver import Receiver
from serve.gateway.routing import Caller
from serve.gateway.spool import Spool
from serve.gateway.web import WebServer
from ssacl.data.quiet import quiet_loggers, quiet_warnings
from ssacl.errors import ServeError

logger = logging.getLogger(__name__)


class Gateway:
    """A started gateway; as a context manager it is stopped at the end of the block.

    Raises
    ------
    ServeError
        The spool is held by another gateway or cannot be made, or the address cannot be listened on.
    ConfigError
        A file or environment variable that the configuration names is not there.
    """

    def __init__(self, config: GatewayConfig) -> None:
        # Below its warnings httpx tells every request.
        quiet_loggers("httpx", "httpcore")
        quiet_warnings("pydicom")
        self._endpoint = ReportClient(config.endpoint)
        senders = {name: open_sender(name, destination, config.ae_title) for name, destination in config.destinations.items()}
        try:
            self._spool = Spool(config.spool, config.limits, config.retention)
        except OSError as error:
            raise ServeError(f"The spool folder {config.spool} cannot be written. Give a folder of this user.") from error
        try:
            self._start(config, senders)
        except BaseException:
            self._spool.close()
            raise

    def _start(self, config: GatewayConfig, senders: Mapping[str, Sender]) -> None:
        self._metrics = GatewayMetrics(self._spool)
        self._audit = AuditLog(config.audit_file) if config.audit_file else None
        self._courier = Courier(self._spool, self._endpoint, senders, config.retry, config.num_couriers, self._metrics)
        intake = Intake(config, self._spool, self._courier.add, self._metrics, self._audit)
        with ExitStack() as started:
            receiver = Receiver(config, intake, self._turned_away)
            self.port = receiver.start()
            started.callback(receiver.stop)
            if config.web is not None:
                web = WebServer(config, config.web, intake, self._metrics, self._turned_away)
                started.callback(web.stop)
                self.web_port = web.port
            if config.metrics is not None:
                figures = MetricsServer(config.metrics, self._metrics)
                started.callback(figures.stop)
                self.metrics_port = figures.port
            self._courier.start()
            self._started = started.pop_all()

    def stop(self) -> None:
        """Take no more, let work in hand end, leave the rest in the spool."""
        self._started.close()
        self._courier.stop()
        self._endpoint.close()
        self._spool.close()

    def _turned_away(self, reason: str, caller: Caller) -> None:
        self._metrics.turned_away(reason)
        if self._audit is not None:
            told = {"association": "association rejected", "tls": "no TLS, or no certificate that is accepted"}[reason]
            name = caller.name if len(caller.name) <= 16 and caller.name.isprintable() else ""
            try:
                self._audit.record(Event(name, caller.address, "association", "E", "4", told, uuid.uuid4().hex, kind=SECURITY_ALERT))
            except OSError as error:
                logger.error("the audit record cannot be written (%s)", type(error).__name__)

    def __enter__(self) -> Gateway:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run_gateway(config: GatewayConfig) -> None:
    """Serve until SIGINT or SIGTERM. See `Gateway` for what it raises."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with Gateway(config) as gateway:
        logger.info("gateway %s listens on port %d, endpoint %s", config.ae_title, gateway.port, config.endpoint.url)
        stopped.wait()
        logger.info("stopping; what is not finished stays in the spool")
