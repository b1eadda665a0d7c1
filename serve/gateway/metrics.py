"""Figures of the gateway for Prometheus. Labels are names of the configuration and of outcomes, nothing of callers or patients."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import Counter, Gauge, start_http_server

from serve.gateway.config import Figures
from serve.gateway.spool import Spool
from serve.metrics import RequestMetrics
from ssacl.errors import ServeError


class GatewayMetrics(RequestMetrics):
    """Counts since the start of the process, and what the spool holds at the moment of asking."""

    def __init__(self, spool: Spool) -> None:
        super().__init__()
        self._received = Counter(
            "ssacl_gateway_received_total",
            "Instances handed in, by what was answered: accepted, known, passed, refused, full, failed.",
            ("way", "outcome"),
            registry=self.registry,
        )
        self._turned_away = Counter(
            "ssacl_gateway_turned_away_total", "Associations and connections that were not let in.", ("reason",), registry=self.registry
        )
        self._attempts = Counter(
            "ssacl_gateway_attempts_total",
            "Attempts at the endpoint and at destinations: done, away, failed, refused.",
            ("target", "outcome"),
            registry=self.registry,
        )
        self._settled = Counter(
            "ssacl_gateway_settled_total", "Instances that are done with: delivered or quarantined.", ("outcome",), registry=self.registry
        )
        depth = Gauge("ssacl_gateway_spool_instances", "Instances in the spool by state.", ("state",), registry=self.registry)
        for state in ("unread", "undelivered", "quarantine"):
            depth.labels(state).set_function(_later(spool.depth, state))
        size = Gauge("ssacl_gateway_spool_bytes", "Of waiting instances and their results.", registry=self.registry)
        size.set_function(spool.num_bytes)
        age = Gauge("ssacl_gateway_oldest_waiting_seconds", "Age of the oldest instance that waits; 0 without one.", registry=self.registry)
        age.set_function(lambda: max(0.0, time.time() - received_at) if (received_at := spool.oldest()) else 0.0)
        # From the start, so that a first one is an increase.
        for outcome in ("delivered", "quarantined"):
            self._settled.labels(outcome)

    def received(self, way: str, outcome: str) -> None:
        """Note an instance that was handed in."""
        self._received.labels(way, outcome).inc()

    def turned_away(self, reason: str) -> None:
        """Note a caller that was not let in."""
        self._turned_away.labels(reason).inc()

    def attempted(self, target: str, outcome: str) -> None:
        """Note an attempt at the endpoint or at a destination."""
        self._attempts.labels(target, outcome).inc()

    def settled(self, outcome: str) -> None:
        """Note an instance that is done with."""
        self._settled.labels(outcome).inc()


class MetricsServer:
    """Answers Prometheus on a port of its own.

    Raises
    ------
    ServeError
        The address is taken or not of this machine.
    """

    def __init__(self, figures: Figures, metrics: GatewayMetrics) -> None:
        try:
            self._server, self._thread = start_http_server(figures.port, figures.host, metrics.registry)
        except OSError as error:
            where = f"{figures.host}:{figures.port}"
            raise ServeError(f"Cannot give figures at {where}. Choose another metrics.host or metrics.port.") from error
        self.port = int(self._server.server_port)

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _later(depth: Callable[[str], int], state: str) -> Callable[[], float]:
    return lambda: depth(state)
