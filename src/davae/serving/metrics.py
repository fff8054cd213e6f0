"""What a server counts and times, in Prometheus' words."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        # No label has a client's words: each value would be kept for good.
        self.requests = Counter(
            "davae_requests", "Requests for images, by HTTP status.", ["status"], registry=self.registry
        )
        self.images = Counter("davae_images", "Images that were made and sent.", registry=self.registry)
        self.stopped = Counter(
            "davae_stopped_batches", "Batches that ended because nobody waited any more.", registry=self.registry
        )

        # Batches.
        self.batch = Histogram(
            "davae_batch_images", "Images in a batch.", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self.waiting = Histogram(
            "davae_waiting_seconds", "Time of a request in the queue.", buckets=SECONDS, registry=self.registry
        )
        self.seconds = Histogram(
            "davae_batch_seconds", "Time of a batch in its worker.", buckets=SECONDS, registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A number that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def to_text(self) -> bytes:
        """All numbers, as Prometheus reads them."""
        return generate_latest(self.registry)
