"""What /metrics shows, in Prometheus's text format."""

from __future__ import annotations

from typing import Any

from .batching import MISSING, Batcher

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
except ImportError:
    raise ImportError(MISSING) from None


class Metrics:
    """Counters of requests, and of the batches of `batcher`, whose `on_batch` it becomes."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "odelt"}
        sizes = {"buckets": [2.0**i for i in range(9)], **own}
        times = {"buckets": [0.001 * 2**i for i in range(16)], **own}
        self.requests = Counter(
            "requests",
            "Requests by route and status; 499: the client left",
            ["route", "status"],
            **own,
        )
        self.rejected = Counter(
            "refused", "Requests answered with 429 or 503, by reason", ["reason"], **own
        )
        self.latency = Histogram(
            "request_seconds", "Seconds from a request of /generate to its answer", **times
        )
        self.late = Counter("late", "Answers that came after their deadline", **own)
        self.batch_images = Histogram("batch_images", "Images of a batch", **sizes)
        self.batch_requests = Histogram("batch_requests", "Requests that shared a batch", **sizes)
        self.batch_seconds = Histogram(
            "batch_seconds", "Seconds that a batch took to draw", **times
        )
        waiting = Gauge("waiting_images", "Images that wait", **own)
        waiting.set_function(lambda: batcher.waiting)
        Gauge("ready", "1 if requests are taken", **own).set_function(lambda: batcher.alive)
        batcher.on_batch = self.observe_batch

    def observe_batch(self, requests: int, images: int, seconds: float) -> None:
        self.batch_requests.observe(requests)
        self.batch_images.observe(images)
        self.batch_seconds.observe(seconds)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, status).inc()
        if route == "/generate":
            self.latency.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
