"""The gateway as a whole: receiver, spool and couriers, from one configuration."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

from serve.gateway.config import GatewayConfig
from serve.gateway.courier import Courier
from serve.gateway.delivery import open_sender
from serve.gateway.endpoint import ReportClient
from serve.gateway.receiver import Receiver
from serve.gateway.spool import Spool
from ssacl.data.quiet import quiet_loggers
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
        self._endpoint = ReportClient(config.endpoint)
        senders = {name: open_sender(name, destination, config.ae_title) for name, destination in config.destinations.items()}
        try:
            self._spool = Spool(config.spool, config.limits, config.retention)
        except OSError as error:
            raise ServeError(f"The spool folder {config.spool} cannot be written. Give a folder of this user.") from error
        self._courier = Courier(self._spool, self._endpoint, senders, config.retry, config.num_couriers)
        self._receiver = Receiver(config, self._spool, self._courier.add)
        try:
            self.port = self._receiver.start()
        except BaseException:
            self._spool.close()
            raise
        self._courier.start()

    def stop(self) -> None:
        """Take no more, let work in hand end, leave the rest in the spool."""
        self._receiver.stop()
        self._courier.stop()
        self._endpoint.close()
        self._spool.close()

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
