"""Traffic through a scheduler: on a simulated clock with a cost model, or in real time.

The simulation is the engine itself, with its cache, scheduler and decoder; what is missing is the
model: a step computes nothing, and moves the clock by what the cost model says.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import ConfigError, StepError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.core.spec import ModelSpec
from pyllmlite.engine.engine import Engine
from pyllmlite.engine.trace import Arrival
from pyllmlite.hooks.cache import CacheNeeds
from pyllmlite.hooks.decoder import DecoderContext
from pyllmlite.hooks.registry import Registry
from pyllmlite.hooks.scheduler import SchedulerContext
from pyllmlite.model.kv_groups import kv_groups
from pyllmlite.model.options import Options

# Seconds of a step: sequences' new tokens, their contexts after them, rows of logits.
Cost = Callable[[Seq[int], Seq[int], int], float]


FAIR_LOOKS = 16


class _NoBatch:
    """The part of a native batch that the engine needs: every token drawn is 0."""

    any_failed = False

    def __init__(self, max_rows: int, max_len: int) -> None:
        self.token_table = np.zeros((max_rows, max_len), np.int32)
        self.counts: Seq[int] = ()
        self.contexts: Seq[int] = ()
        self.num_rows = 0

    def set_step(
        self, rows: Seq[int], starts: Seq[int], counts: Seq[int], logits: Seq[int]
    ) -> None:
        self.counts = counts
        self.contexts = [start + count for start, count in zip(starts, counts, strict=True)]
        self.num_rows = sum(logits)

    @property
    def token_list(self) -> list[int]:
        return [0] * self.num_rows

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None  # sampling parameters, copies: nobody reads them


class _Clock:
    """A Program that takes time and does nothing else."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, batch: _NoBatch) -> None:
        self.now += self._cost(batch.counts, batch.contexts, batch.num_rows)


def simulated_engine(
    spec: ModelSpec,
    scheduler: str | type,
    cost: Cost,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    kv_bytes: float,
    kv_dtype: str = "bf16",
    prefix_caching: bool = True,
    extra: Mapping[str, Any] | None = None,
    registry: Registry | None = None,
) -> tuple[Engine, _Clock, Options]:
    """An engine of this shape without a model, its clock, and the options that were read.

    Args:
        scheduler: A name, or a class.
        kv_bytes: Of keys and values; when they are full, sequences are preempted.
    Raises:
        PluginError, CapacityError: As at the loading of a model.
    """
    registry = registry or Registry.load()
    options = Options(dict(extra or {}))
    chosen = registry.select("scheduler", scheduler, None).cls()
    chosen.setup(SchedulerContext(max_num_seqs, max_num_batched_tokens, options))
    needs = CacheNeeds(
        device="cpu",
        dtype="bf16",
        groups=kv_groups(spec),
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_model_len=max_model_len,
        max_rows=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_bytes=int(kv_bytes),
        kv_dtype=kv_dtype,
        prefix_caching=prefix_caching,
        extra=options,
    )
    cache = registry.select("cache", None, needs).cls(needs)
    context = DecoderContext(spec.vocab_size, max_model_len, (), None)
    decoder = registry.select("decoder", "sample", None).cls(context)
    clock = _Clock(cost)
    built = SimpleNamespace(
        config=EngineConfig(max_num_seqs=max_num_seqs),
        spec=spec,
        program=clock,
        batch=_NoBatch(max_num_seqs, max_model_len),
        cache=cache,
        scheduler=chosen,
        decoder=decoder,
        decoders=lambda name: decoder,
        proposer=None,
        constraints=[],
        tokenizer=None,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_logit_rows=max_num_seqs,
    )
    return Engine(built, clock), clock, options


@dataclass
class Replay:
    """What came out; all times in seconds.

    Attributes:
        ttft: From arrival to the first token, of each request.
        latency: From arrival to the last token.
        tpot: Between tokens after the first, the mean of each request with two or more.
        gaps: The longest time between two tokens of each request.
        usual_step: Median of the steps in which everybody decodes.
        jain: Fairness between clients, 1 at best (:func:`fairness`); with one client the index of
            the requests' tokens a second.
        prefill_tokens: Prompt tokens that were computed.
    """

    scheduler: str
    requests: int
    makespan: float
    output_tokens: int
    prefill_tokens: int
    steps: int
    preemptions: int
    usual_step: float
    ttft: list[float] = field(repr=False)
    latency: list[float] = field(repr=False)
    tpot: list[float] = field(repr=False)
    gaps: list[float] = field(repr=False)
    jain: float

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.makespan if self.makespan else 0.0

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.makespan if self.makespan else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler,
            "requests": self.requests,
            "makespan": self.makespan,
            "tokens_per_second": self.tokens_per_second,
            "requests_per_second": self.requests_per_second,
            "prefill_tokens": self.prefill_tokens,
            "steps": self.steps,
            "preemptions": self.preemptions,
            "usual_step": self.usual_step,
            "jain": self.jain,
            **{
                f"{name}_{word}": value
                for name in ("ttft", "tpot", "latency", "gaps")
                for word, value in _quantiles(getattr(self, name)).items()
            },
        }


def together(parts: Seq[Replay]) -> Replay:
    """Replicas as one: sums, all requests' times, the longest makespan; usual step and fairness are
    means."""

    def joined(name: str) -> list[float]:
        return [value for part in parts for value in getattr(part, name)]

    def total(name: str) -> int:
        return sum(getattr(part, name) for part in parts)

    return Replay(
        scheduler=parts[0].scheduler,
        requests=total("requests"),
        makespan=max(part.makespan for part in parts),
        output_tokens=total("output_tokens"),
        prefill_tokens=total("prefill_tokens"),
        steps=total("steps"),
        preemptions=total("preemptions"),
        usual_step=statistics.fmean(part.usual_step for part in parts),
        ttft=joined("ttft"),
        latency=joined("latency"),
        tpot=joined("tpot"),
        gaps=joined("gaps"),
        jain=statistics.fmean(part.jain for part in parts),
    )


def _quantiles(values: list[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p99": None, "max": None}
    ordered = sorted(values)
    at = min(len(ordered) - 1, int(0.99 * len(ordered)))
    return {"p50": statistics.median(ordered), "p99": ordered[at], "max": ordered[-1]}


def jain_index(values: Seq[float]) -> float:
    """``(sum x)^2 / (n sum x^2)`` (Jain, Chiu & Hawe 1984): 1 if all are alike, 1/n if one has
    everything."""
    squares = sum(x * x for x in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def fair_shares(total: float, wishes: Mapping[str, float]) -> dict[str, float]:
    """``total`` divided max-min fairly: nobody gets more than its wish, and what one leaves is
    divided among the others."""
    shares: dict[str, float] = {}
    left = sorted(wishes, key=lambda client: wishes[client])
    for i, client in enumerate(left):
        shares[client] = min(wishes[client], total / (len(left) - i))
        total -= shares[client]
    return shares


def fairness(served: Seq[tuple[float, str, int]], requests: Seq[Any]) -> float:
    """Jain's index of what each client was served by a time as a part of its fair share of it: the
    mean over :data:`FAIR_LOOKS` times, the last one when the first client has nothing left.

    Args:
        served: ``(time, client, tokens)``, prompt and output alike, in the order of time.
    """
    last: dict[str, float] = defaultdict(float)
    for request in requests:
        last[request.client] = max(last[request.client], request.finish_time)
    begin, end = served[0][0], min(last.values())
    got = dict.fromkeys(last, 0.0)
    found = []
    at = 0
    for look in range(1, FAIR_LOOKS + 1):
        now = begin + (end - begin) * look / FAIR_LOOKS
        while at < len(served) and served[at][0] <= now:
            got[served[at][1]] += served[at][2]
            at += 1
        wishes = dict.fromkeys(last, 0.0)
        for request in requests:
            if request.arrival_time <= now:
                output = sum(seq.num_output_tokens for seq in request.sequences)
                wishes[request.client] += len(request.prompt_token_ids) + output - 1
        entitled = fair_shares(sum(got.values()), wishes)
        found.append(
            jain_index([min(1.0, got[c] / entitled[c]) if entitled[c] else 1.0 for c in last])
        )
    return statistics.fmean(found)


def replay(
    engine: Engine, trace: Seq[Arrival], clock: _Clock | None = None, name: str = ""
) -> Replay:
    """Play a trace to its end.

    Args:
        clock: The simulated engine's; None: in real time.
    Raises:
        ConfigError: A request cannot be run by this engine at all.
        StepError: One failed on the way.
    """
    now: Callable[[], float] = clock or time.monotonic
    begin = now()
    coming = sorted(enumerate(trace), key=lambda pair: pair[1].time)
    position = 0
    step = engine._step
    states: dict[str, Any] = {}
    last: dict[str, float] = {}
    worst: dict[str, float] = defaultdict(float)
    usual: list[float] = []
    served: list[tuple[float, str, int]] = []
    several = len({asked.client for asked in trace}) > 1
    prefill = 0
    start_steps, start_preemptions = engine.num_steps, engine.pool.preemptions
    while position < len(coming) or engine.has_unfinished:
        while position < len(coming) and coming[position][1].time + begin <= now():
            index, asked = coming[position]
            params = SamplingParams(
                max_tokens=asked.output, temperature=0.0, ignore_eos=True, detokenize=False
            )
            prompt = {"prompt_token_ids": list(asked.prompt)}
            state = engine.prepare(str(index), prompt, params, asked.priority, asked.client)
            state.request.arrival_time = begin + asked.time
            states[str(index)] = state
            engine.submit(state)
            position += 1
        if not engine.has_unfinished:
            _wait(clock, begin + coming[position][1].time)
            continue
        before = now()
        steps = engine.num_steps
        engine.step()
        if engine.num_steps == steps:
            pause = engine.wait_seconds()
            until = now() + pause
            if position < len(coming):
                until = min(until, begin + coming[position][1].time)
            if pause > 0:
                _wait(clock, until)
            continue
        after = now()
        decodes = True
        for seq, count, wanted in zip(step.seqs, step.counts, step.logits, strict=True):
            key = seq.request.id
            if several:
                served.append((after, seq.request.client, count))
            if count > 1 or seq.num_output_tokens <= 1:
                prefill += count
                decodes = False
            if wanted:
                if key in last:
                    worst[key] = max(worst[key], after - last[key])
                last[key] = after
        if decodes:
            usual.append(after - before)
    requests = [state.request for state in states.values()]
    for request in requests:
        if request.error:
            raise StepError(f"request {request.id}: {request.error}")
    latency = [r.finish_time - r.arrival_time for r in requests]
    outputs = [sum(s.num_output_tokens for s in r.sequences) for r in requests]
    if several:
        fair = fairness(served, requests)
    else:
        fair = jain_index([n / max(t, 1e-12) for n, t in zip(outputs, latency, strict=True)])
    return Replay(
        scheduler=name or engine.scheduler.name,
        requests=len(requests),
        makespan=max((r.finish_time for r in requests), default=begin) - begin,
        output_tokens=sum(outputs),
        prefill_tokens=prefill,
        steps=engine.num_steps - start_steps,
        preemptions=engine.pool.preemptions - start_preemptions,
        usual_step=statistics.median(usual) if usual else 0.0,
        ttft=[r.first_token_time - r.arrival_time for r in requests],
        latency=latency,
        tpot=[
            (r.finish_time - r.first_token_time) / (tokens - 1)
            for r, tokens in zip(requests, outputs, strict=True)
            if tokens > 1
        ],
        gaps=[worst[r.id] for r in requests if r.id in worst],
        jain=fair,
    )


def _wait(clock: _Clock | None, until: float) -> None:
    if clock is not None:
        clock.now = max(clock.now, until)
    else:
        time.sleep(max(0.0, until - time.monotonic()))


def check_fits(trace: Seq[Arrival], max_model_len: int) -> None:
    longest = max((len(request.prompt) + request.output for request in trace), default=0)
    if longest > max_model_len:
        raise ConfigError(
            f"the trace has a request of {longest} tokens, max_model_len is {max_model_len}"
        )
