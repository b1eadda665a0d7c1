"""Figures of one process for Prometheus. Labels are operations, statuses and names of the configuration, nothing of clients or patients."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class RequestMetrics:
    """What a `Guard` counts. Each API has its own registry, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("operation", "status")
        self._requests = Counter("ssacl_requests_total", "Requests answered.", labels, registry=self.registry)
        buckets = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
        self._seconds = Histogram(
            "ssacl_request_seconds", "From request to answer.", ("operation",), buckets=buckets, registry=self.registry
        )
        self.in_hand = Gauge("ssacl_requests_in_hand", "Requests being answered.", registry=self.registry)

    def count(self, operation: str, status: int, seconds: float) -> None:
        """Note an answered request."""
        self._requests.labels(operation, str(status)).inc()
        self._seconds.labels(operation).observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)


class EndpointMetrics(RequestMetrics):
    """Of an ingress replica."""

    def __init__(self) -> None:
        super().__init__()
        self.pending = Gauge("ssacl_kept_reports_pending", "Accepted with respond-async and not answered yet.", registry=self.registry)
