"""``/metrics``: Prometheus figures; names are vLLM's behind ``pyllmlite_``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from pyllmlite.serve.tickets import BaseClient, Ticket

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

# stats' name -> (name, help); what the engine counts, read when somebody asks.
_GAUGES = {
    "running": ("num_requests_running", "Sequences in the running batch."),
    "waiting": ("num_requests_waiting", "Sequences that wait for a place in it."),
    "num_blocks": ("kv_cache_blocks", "KV blocks there are."),
    "num_free_blocks": ("kv_cache_free_blocks", "KV blocks that are free or only cached."),
    "num_cached_blocks": ("kv_cache_cached_blocks", "Free KV blocks with a known prefix in them."),
}
_COUNTERS = {
    "steps": ("engine_steps", "Steps that the engine has run."),
    "preemptions": ("num_preemptions", "Sequences that had to give their blocks back."),
    "query_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    "hit_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "evictions": ("prefix_cache_evictions", "Cached KV blocks that were thrown out."),
    "draft_tokens": ("spec_decode_draft_tokens", "Tokens proposed for verification."),
    "accepted_tokens": ("spec_decode_accepted_tokens", "Proposed tokens that were accepted."),
}


class Metrics:
    """One server's registry.

    Args:
        client: Its engine; its ``stats`` are read at each scrape.
    """

    def __init__(self, client: BaseClient) -> None:
        self.registry = CollectorRegistry()
        self._client = client
        self.registry.register(self)  # type: ignore[arg-type]

        def histogram(name: str, help: str, buckets: Any) -> Histogram:
            return Histogram(f"pyllmlite_{name}", help, buckets=buckets, registry=self.registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"pyllmlite_{name}", help, labels, registry=self.registry)

        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _SLOW)
        self._tpot = histogram(
            "time_per_output_token_seconds", "Mean over the tokens behind a request's first.", _FAST
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _SLOW)
        self._prompt = counter("prompt_tokens", "Prompt tokens of requests that have ended.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._ended = counter(
            "request_success", "Completions that have ended, by reason.", "finished_reason"
        )
        self.refused = counter("requests_refused", "Requests refused, by HTTP status.", "status")
        self.generated = 0

    def note_tokens(self, count: int) -> None:
        self.generated += count
        self._generated.inc(count)

    def note_end(self, ticket: Ticket) -> None:
        """A prompt has ended or was left."""
        self._prompt.inc(ticket.prompt_tokens)
        for reason in ticket.reasons:
            self._ended.labels(reason).inc()
        first, end = ticket.first_time, ticket.end_time
        if first is None or end is None:
            return
        self._ttft.observe(first - ticket.arrival)
        self._e2e.observe(end - ticket.arrival)
        behind = ticket.tokens / max(len(ticket.reasons), 1) - 1
        if behind > 0:
            self._tpot.observe((end - first) / behind)

    def collect(self) -> Iterable[Any]:
        """What prometheus-client asks of a collector."""
        stats = self._client.stats
        for key, (name, help) in _GAUGES.items():
            if key in stats:
                yield GaugeMetricFamily(f"pyllmlite_{name}", help, value=stats[key])
        for key, (name, help) in _COUNTERS.items():
            if key in stats:
                yield CounterMetricFamily(f"pyllmlite_{name}", help, value=stats[key])
        if stats.get("num_blocks"):
            used = 1 - stats["num_free_blocks"] / stats["num_blocks"]
            yield GaugeMetricFamily(
                "pyllmlite_kv_cache_usage_perc", "Part of the KV blocks that is held.", value=used
            )
        ready = float(self._client.state == "ready")
        yield GaugeMetricFamily("pyllmlite_engine_ready", "1 if it takes requests.", value=ready)

    def text(self) -> bytes:
        return generate_latest(self.registry)
