"""The least time that a step can take: the roofline (Williams, Waterman & Patterson 2009).

A step must read its weights once and the keys and values of every sequence, and do its
multiply-accumulates.  Activations are not counted: they stay in the caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pyllmlite.runtime.program import OpEntry
from pyllmlite.sizing.machine import Machine


@dataclass(frozen=True)
class Step:
    """The shape of a step: of each sequence its new tokens and its context after them, and how
    many rows of logits are wanted."""

    sequences: tuple[tuple[int, int], ...]
    logit_rows: int


def decode(batch: int, context: int) -> Step:
    """One token of each of ``batch`` sequences of ``context`` tokens, the new one included."""
    return Step(((1, context),) * batch, batch)


def prefill(*prompts: int) -> Step:
    """Whole prompts of so many tokens, in one step."""
    return Step(tuple((tokens, tokens) for tokens in prompts), len(prompts))


@dataclass(frozen=True)
class Work:
    """What a step cannot do without: bytes read, and multiply-accumulates by dtype."""

    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    macs: dict[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes


def work(ops: Iterable[OpEntry], step: Step) -> Work:
    """Of one step of a Program's ``entries``."""
    tokens = sum(new for new, _ in step.sequences)
    weights = kv = 0.0
    macs: dict[str, float] = {}
    for entry in ops:
        cost = entry.cost
        weights += cost.weight_bytes
        products = (step.logit_rows if cost.per_logit_row else tokens) * cost.token_macs
        for new, context in step.sequences:
            if not cost.context_bytes and not cost.context_macs:
                break
            kv += cost.context_bytes * keys_read(new, context, cost.window)
            products += cost.context_macs * pairs(new, context, cost.window)
        if products:
            macs[cost.mac_dtype] = macs.get(cost.mac_dtype, 0.0) + products
    return Work(weights, kv, macs)


def keys_read(new: int, context: int, window: int = 0) -> int:
    """Tokens whose keys any of the last ``new`` of ``context`` tokens sees."""
    return min(context, window + new - 1) if window else context


def pairs(new: int, context: int, window: int = 0) -> int:
    """(token, visible key) pairs of the last ``new`` of ``context`` tokens."""
    window = window or context
    full = min(new, max(0, context - window))  # tokens that see a whole window and more before it
    rising = new - full  # the others see all that is before them
    last = context - full
    return full * window + rising * (2 * last - rising + 1) // 2


@dataclass(frozen=True)
class Limit:
    """The least seconds of a step on a machine.

    Attributes:
        memory_seconds: Reading its bytes, from where they lie (``in_cache``).
        compute_seconds: Its multiply-accumulates, each dtype at its own peak, one after another.
        dram_seconds, cache_seconds: Both figures for reading; the cache's is None where its
            bandwidth was not measured.
        in_cache: All bytes of the step fit the last-level cache together, and so can stay there
            from step to step.
    """

    memory_seconds: float
    compute_seconds: float
    dram_seconds: float
    cache_seconds: float | None
    in_cache: bool

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)

    @property
    def bound(self) -> str:
        """``compute``, ``cache`` or ``dram``: what the step waits for."""
        if self.compute_seconds > self.memory_seconds:
            return "compute"
        return "cache" if self.in_cache else "dram"


def limit(work: Work, machine: Machine) -> Limit:
    """Reading counts at DRAM's bandwidth, unless all of the step's bytes fit the last-level cache:
    then at the cache's, which is the harder limit."""
    dram = work.bytes / machine.dram_bandwidth
    cache = work.bytes / machine.cache_bandwidth if machine.cache_bandwidth else None
    in_cache = cache is not None and work.bytes <= machine.cache_bytes
    compute = sum(count / machine.macs[dtype] for dtype, count in work.macs.items())
    memory = cache if in_cache and cache is not None else dram
    return Limit(memory, compute, dram, cache, in_cache)
