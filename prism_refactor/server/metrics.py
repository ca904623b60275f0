"""What `/metrics` shows."""

import threading
from collections import Counter as Count
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prism_refactor.serving.engine import Engine, Step

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of a server. `on_step` runs in the engine's thread, the rest in the server's."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        known: dict[str, Any] = {"registry": self.registry}
        self.first = Histogram("prism_ttft_seconds", "From a request to its first token.", ["k"], buckets=_SECONDS, **known)
        self.per_token = Histogram("prism_tpot_seconds", "Per token after the first.", ["k"], buckets=_SECONDS, **known)
        self.whole = Histogram("prism_request_seconds", "From a request to its last token.", ["k"], buckets=_SECONDS, **known)
        self.finished = Counter("prism_requests_total", "Requests by how they ended.", ["end"], **known)
        self.tokens = Counter("prism_tokens_total", "Tokens run, of prompts and of requests that decode.", ["kind"], **known)
        self.sub_experts = Counter("prism_sub_experts_total", "Sub-experts computed in each MoE layer, over all tokens.", **known)
        self.step = Histogram("prism_step_seconds", "Steps of the engine.", buckets=_SECONDS, **known)
        self.predicted = Counter("prism_step_predicted_seconds_total", "What the performance model said they would take.", **known)
        self.measured = Counter("prism_step_measured_seconds_total", "What those with a prediction took.", **known)
        self.scheduling = Counter("prism_scheduling_seconds_total", "Of the steps' seconds, the scheduler's own.", **known)
        self._lock = threading.Lock()

    def on_step(self, step: Step) -> None:
        """Note a step."""
        self.step.observe(step.seconds)
        self.scheduling.inc(step.scheduling)
        self.sub_experts.inc(step.sub_experts)
        self.tokens.labels("prefill").inc(step.prefill)
        self.tokens.labels("decode").inc(step.decode)
        if step.predicted is not None:
            self.predicted.inc(step.predicted)
            self.measured.inc(step.seconds)

    def served(self, k: int, first: float, whole: float, tokens: int) -> None:
        """Note an answer: seconds to its first and last token, and how many there were."""
        self.first.labels(str(k)).observe(first)
        self.whole.labels(str(k)).observe(whole)
        if tokens > 1:
            self.per_token.labels(str(k)).observe((whole - first) / (tokens - 1))

    def watch(self, engine: Engine) -> None:
        """Show the state of an engine too."""
        self.registry.register(_State(engine))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        with self._lock:
            return generate_latest(self.registry)


class _State(Collector):
    """Read when asked for, so that it cannot be stale."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        waiting = self.engine.waiting
        yield GaugeMetricFamily("prism_requests_running", "Requests with a KV cache.", self.engine.running)
        yield GaugeMetricFamily("prism_requests_waiting", "Requests that wait for one.", len(waiting))
        by_k = GaugeMetricFamily("prism_requests_waiting_by_k", "The same by their floor.", labels=["k"])
        for k, number in sorted(Count(waiting).items()):
            by_k.add_metric([str(k)], number)
        yield by_k
        yield GaugeMetricFamily("prism_kv_blocks_in_use", "KV blocks that requests hold.", self.engine.kv_in_use)
        if self.engine.offload is not None:
            for name, value in asdict(self.engine.offload.counters).items():
                yield CounterMetricFamily(f"prism_offload_{name}", "Of offloading, see offload.cache.Counters.", value)
