"""What is counted: names, labels, and each request once."""

from __future__ import annotations

import time
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from crabtwist.metrics import Metrics, status_class
from crabtwist.money import DOLLAR
from crabtwist.testing import make_context
from crabtwist.values import Context, Outcome, Usage

USED = Usage(input_tokens=10, cache_read_tokens=5, output_tokens=7, reasoning_tokens=2)
BOUNDS = ("0.005", "0.01", "3600.0", "+Inf")
CONTEXT = make_context(model="claude", provider="vendor", stream=True)


def outcome(**changes: Any) -> Outcome:
    """Return how some request ended; give what matters."""
    fields: dict[str, Any] = {
        "status": 200,
        "ended_by": "upstream",
        "reason": "complete",
        "message": None,
        "usage": USED,
        "attempts": (),
        "model_answered": None,
        "first_byte_seconds": 0.2,
        "duration_seconds": 1.5,
        "bytes_in": 1,
        "bytes_out": 2,
    }
    return Outcome(**{**fields, **changes})


class MetricsTests(SynchronousTestCase):
    """The registry of one gateway."""

    def setUp(self) -> None:
        self.metrics = Metrics()

    def settle(self, context: Context = CONTEXT, *, known_model: bool = True, **changes: Any) -> None:
        """Settle a request."""
        self.metrics.settled(context, outcome(**changes), known_model=known_model)

    def value(self, name: str, **labels: str) -> float | None:
        """Return a sample."""
        return self.metrics.registry.get_sample_value(f"crabtwist_{name}", labels)

    def samples(self, name: str) -> list[dict[str, str]]:
        """Return the labels of all samples of a name."""
        return [
            sample.labels
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == f"crabtwist_{name}"
        ]

    def test_status_classes(self) -> None:
        """Limits have a class of their own; an answer that broke (0) is the server's failure."""
        classes = {200: "2xx", 206: "2xx", 304: "2xx", 400: "4xx", 404: "4xx", 429: "429", 499: "4xx"}
        classes |= {500: "5xx", 529: "5xx", 0: "5xx"}
        self.assertEqual(classes, {status: status_class(status) for status in classes})

    def test_names(self) -> None:
        """The exposition has every metric, explained, before anything has happened."""
        text = self.metrics.exposition().decode()
        for name, kind in (
            ("request_duration_seconds", "histogram"),
            ("time_to_first_byte_seconds", "histogram"),
            ("tokens_total", "counter"),
            ("active_connections", "gauge"),
            ("open_streams", "gauge"),
            ("requests_total", "counter"),
            ("retries_total", "counter"),
            ("fallbacks_total", "counter"),
            ("refusals_total", "counter"),
            ("stale_connections_total", "counter"),
        ):
            self.assertIn(f"# TYPE crabtwist_{name} {kind}\n", text)

    def test_duration(self) -> None:
        """A request's time is counted once, by who answered, for what, how, and whether streamed."""
        self.settle()
        labels = {"provider": "vendor", "model": "claude", "status": "2xx", "stream": "true"}
        self.assertEqual([labels], self.samples("request_duration_seconds_count"))
        self.assertEqual(1, self.value("request_duration_seconds_count", **labels))
        self.assertEqual(1.5, self.value("request_duration_seconds_sum", **labels))

    def test_first_byte(self) -> None:
        """So is the time to the first byte, where there was one."""
        self.settle()
        self.settle(first_byte_seconds=None)
        labels = {"provider": "vendor", "model": "claude", "stream": "true"}
        self.assertEqual(1, self.value("time_to_first_byte_seconds_count", **labels))
        self.assertEqual(0.2, self.value("time_to_first_byte_seconds_sum", **labels))

    def test_buckets(self) -> None:
        """A time is counted in every bucket from the first whose bound it does not exceed."""
        for seconds in (0.005, 0.006, 3601):
            self.settle(first_byte_seconds=None, duration_seconds=seconds)
        labels = {"provider": "vendor", "model": "claude", "status": "2xx", "stream": "true"}
        counted = [self.value("request_duration_seconds_bucket", le=le, **labels) for le in BOUNDS]
        self.assertEqual([1, 2, 2, 3], counted)

    def test_cost(self) -> None:
        """What requests cost is added up in dollars; what costs nothing has no sample."""
        self.settle(cost=0)
        self.assertEqual([], self.samples("cost_dollars_total"))
        for cost in (DOLLAR, DOLLAR // 2):
            self.settle(cost=cost)
        self.assertEqual(1.5, self.value("cost_dollars_total", provider="vendor", model="claude"))

    def test_since(self) -> None:
        """Each is shown with the time since when it is counted, as the library of Prometheus does."""
        before = time.time()
        self.settle()
        since = self.value("requests_created", ended_by="upstream", reason="complete")
        assert since is not None
        self.assertTrue(before <= since <= time.time())

    def test_levels(self) -> None:
        """What is under way goes up and down."""
        self.metrics.active.inc()
        self.metrics.active.inc()
        self.metrics.active.dec()
        self.assertEqual([1, 0], [self.value("active_connections"), self.value("open_streams")])

    def test_tokens(self) -> None:
        """Tokens are counted by direction, cached and reasoned ones among them."""
        self.settle()
        self.settle()
        for direction, tokens in (("prompt", 30), ("completion", 18)):
            labels = {"provider": "vendor", "model": "claude", "direction": direction}
            self.assertEqual(tokens, self.value("tokens_total", **labels))

    def test_no_tokens(self) -> None:
        """Where no usage is known, and for answers from a cache, none are counted."""
        self.settle(usage=None)
        self.settle(cache_hit=True)
        self.assertEqual([], self.samples("tokens_total"))

    def test_one_end_each(self) -> None:
        """Whatever the outcome, exactly one end is counted, by who ended it and why."""
        ends = [
            ("upstream", "complete", 200),
            ("client", "client_left", 499),
            ("upstream", "truncated", 0),
            ("gateway", "refused", 429),
            ("upstream", "connect_failed", 502),
        ]
        for number, (ended_by, reason, status) in enumerate(ends, 1):
            self.settle(ended_by=ended_by, reason=reason, status=status)
            self.assertEqual(1, self.value("requests_total", ended_by=ended_by, reason=reason))
            self.assertEqual(number, len(self.samples("requests_total")))

    def test_bounded_labels(self) -> None:
        """A model that is not served has no label of its own, and nobody's deployment is none."""
        for asked in ("x" * 200, 'evil"\n', "other-1"):
            self.settle(make_context(model=asked), known_model=False, usage=None, status=404)
        labels = {"provider": "none", "model": "other", "status": "4xx", "stream": "false"}
        self.assertEqual([labels], self.samples("request_duration_seconds_count"))
        self.assertEqual(3, self.value("request_duration_seconds_count", **labels))

    def test_current_deployment(self) -> None:
        """The label names who answered at last, not who was asked first."""
        context = make_context(model="claude", provider="first")
        context.provider = "second"
        self.settle(context)
        self.assertEqual(
            ["second"], [each["provider"] for each in self.samples("request_duration_seconds_count")]
        )

    def test_counters(self) -> None:
        """Retries, fallbacks, refusals and dead connections are counted with their reasons."""
        self.metrics.retried("vendor", "connect_failed")
        self.metrics.fell_back("vendor", "head_timeout")
        self.metrics.refused("unknown_key")
        self.metrics.stale_counter("vendor")()
        self.assertEqual(1, self.value("retries_total", provider="vendor", error="connect_failed"))
        self.assertEqual(1, self.value("fallbacks_total", provider="vendor", error="head_timeout"))
        self.assertEqual(1, self.value("refusals_total", reason="unknown_key"))
        self.assertEqual(1, self.value("stale_connections_total", provider="vendor"))

    def test_counters_from_the_start(self) -> None:
        """A provider's dead connections are 0 before the first one, so that a rate can be taken."""
        self.metrics.stale_counter("vendor")
        self.assertEqual(0, self.value("stale_connections_total", provider="vendor"))

    def test_own_registry(self) -> None:
        """Two gateways in one process count apart."""
        self.metrics.refused("x")
        self.assertNotIn(b'reason="x"', Metrics().exposition())
