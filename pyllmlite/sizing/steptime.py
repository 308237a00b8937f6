"""How long a step takes: the roofline with what kernels reach of it, and what the host adds.

A :class:`StepModel` sums over the ops of a Program ``op_seconds + max(bytes / (share x bandwidth),
multiply-accumulates / (share x peak))``.  The shares (:class:`Efficiency`) are properties of
kernels, measured one by one or taken from publications; none is fitted to steps of a model.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pyllmlite.runtime.cost import OpCost
from pyllmlite.runtime.program import OpEntry
from pyllmlite.sizing.machine import Machine
from pyllmlite.sizing.roofline import Step, keys_read, pairs

# A time per call by rows: rising points of (rows, seconds).
Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Efficiency:
    """What kernels reach of a machine's peaks, and what a step costs besides.

    Attributes:
        linear_bandwidth: Share of the bandwidth at which a linear op reads weights.
        linear_macs: Share of its dtype's peak that a linear op reaches with many rows.
        attention_bandwidth, attention_macs: The same of attention.
        activation_bandwidth: Share of the bandwidth at which the other ops move activations; above
            1 where they stay in a cache.
        op_seconds: Of every op: waking and joining the threads, or a launch within a graph.
        step_seconds, sequence_seconds: The host's part of a step, and of each sequence in it.
        curves: Measured seconds of linear ops by the kind of their matrix; what is in here is
            taken in place of the shares.
        source: Where the figures are from.
    """

    linear_bandwidth: float
    linear_macs: Mapping[str, float]
    attention_bandwidth: float
    attention_macs: float
    activation_bandwidth: float
    op_seconds: float
    step_seconds: float
    sequence_seconds: float
    curves: Mapping[str, Curve] = field(default_factory=dict)
    source: str = ""


# Two threads of a Zen 4: reading weights at one row, int8 products at 512 rows, attention in a
# prefill of 512 tokens, bench overhead.  The other shares are estimates; all of them carry over to
# other CPUs roughly, which is why --measure times the kernels.
CPU = Efficiency(
    linear_bandwidth=0.85,
    linear_macs={"int8": 0.5, "bf16": 0.7, "f32": 0.7},
    attention_bandwidth=0.7,
    attention_macs=0.65,
    activation_bandwidth=2.0,
    op_seconds=1.5e-6,
    step_seconds=10e-6,
    sequence_seconds=1.5e-6,
    source="typical shares of a CPU (--measure times this machine's kernels)",
)
# Decode kernels that are well tuned read at 0.8 to 0.9 of the bandwidth (FlashInfer reports 0.88,
# Marlin nearly the full ratio of the bytes), matrix products of thousands of rows reach 0.6 to 0.75
# of the dense peak (cuBLAS; FlashAttention-3 reports 0.65 at head size 128).
GPU = Efficiency(
    linear_bandwidth=0.8,
    linear_macs={"int8": 0.6, "bf16": 0.65, "f32": 0.5},
    attention_bandwidth=0.8,
    attention_macs=0.5,
    activation_bandwidth=0.8,
    op_seconds=3e-6,
    step_seconds=300e-6,
    sequence_seconds=5e-6,
    source="published figures of tuned kernels, step inside a CUDA graph",
)


@dataclass(frozen=True)
class Timing:
    """Seconds of a step.  ``memory``: of the ops that wait for bytes; ``compute``: of those that
    wait for arithmetic; ``host``: the engine, and the ops' fixed part."""

    memory: float
    compute: float
    host: float

    @property
    def seconds(self) -> float:
        return self.memory + self.compute + self.host


def interpolate(curve: Curve, rows: int) -> float:
    """Linear between two points; beyond the last one in its proportion to the rows."""
    at = bisect_right(curve, (rows, float("inf")))
    if at == 0:
        return curve[0][1]
    low, seconds = curve[at - 1]
    if at == len(curve):
        return seconds * rows / low
    high, more = curve[at]
    return seconds + (more - seconds) * (rows - low) / (high - low)


def kind_of(op_name: str) -> str:
    """``layers.3.qkv`` to ``qkv``: which curve an op goes by."""
    return re.sub(r"^layers\.\d+\.", "", op_name)


class StepModel:
    """The seconds of any step of one model on one machine.

    Args:
        ops: Of a loaded Program, or :func:`~pyllmlite.sizing.footprint.planned_ops`.
    """

    def __init__(self, ops: Iterable[OpEntry], machine: Machine, efficiency: Efficiency) -> None:
        self.machine = machine
        self.efficiency = efficiency
        # Ops that are alike are summed up: (name, how often, cost).
        self.entries = tuple(ops)
        alike: dict[tuple[str, OpCost], int] = {}
        for entry in self.entries:
            key = (kind_of(entry.name), entry.cost)
            alike[key] = alike.get(key, 0) + 1
        self.ops = [(name, count, cost) for (name, cost), count in alike.items()]
        self._linear = [op for op in self.ops if op[2].weight_bytes]
        self._attention = [op for op in self.ops if op[2].context_bytes]
        self._rest = [op for op in self.ops if op not in self._linear + self._attention]
        self._count = sum(count for _, count, _ in self.ops)
        self.windows = tuple(dict.fromkeys(op[2].window for op in self._attention))
        self._by_shape: dict[tuple[int, int], tuple[float, float]] = {}

    def step(self, step: Step) -> Timing:
        """Of the shape of a step."""
        keys = {
            window: sum(keys_read(new, context, window) for new, context in step.sequences)
            for window in self.windows
        }
        seen = {
            window: sum(pairs(new, context, window) for new, context in step.sequences)
            for window in self.windows
        }
        tokens = sum(new for new, _ in step.sequences)
        return self.seconds(tokens, step.logit_rows, len(step.sequences), keys, seen)

    def cost(self, counts: Sequence[int], contexts: Sequence[int], logit_rows: int) -> float:
        """Seconds of a step, from each sequence's new tokens and its context after them."""
        tokens = sum(counts)
        if self.windows in ((), (0,)) and tokens == len(counts):  # all decode, nothing is windowed
            keys = {0: sum(contexts)}
            return self.seconds(tokens, logit_rows, len(counts), keys, keys).seconds
        return self.step(Step(tuple(zip(counts, contexts, strict=True)), logit_rows)).seconds

    def seconds(
        self,
        tokens: int,
        logit_rows: int,
        sequences: int,
        keys: Mapping[int, int],
        seen: Mapping[int, int],
    ) -> Timing:
        """The same from sums over the sequences.

        Args:
            keys: By window (0: none) the keys that are read.
            seen: By window the (token, visible key) pairs.
        """
        if not tokens:
            return Timing(0.0, 0.0, self.efficiency.step_seconds)
        machine, eff = self.machine, self.efficiency
        memory, compute = self._without_context(tokens, logit_rows)
        for _, count, cost in self._attention:
            reading = keys[cost.window] * cost.context_bytes
            reading /= eff.attention_bandwidth * machine.dram_bandwidth
            products = seen[cost.window] * cost.context_macs
            products /= eff.attention_macs * machine.macs[cost.mac_dtype]
            if reading >= products:
                memory += count * reading
            else:
                compute += count * products
        host = eff.step_seconds + sequences * eff.sequence_seconds
        host += eff.op_seconds * self._count
        return Timing(memory, compute, host)

    def _without_context(self, tokens: int, logit_rows: int) -> tuple[float, float]:
        """Linear ops and the small ones: they depend on numbers of rows only."""
        key = (tokens, logit_rows)
        if key in self._by_shape:
            return self._by_shape[key]
        machine, eff = self.machine, self.efficiency
        memory = compute = 0.0
        for name, count, cost in self._linear:
            rows = logit_rows if cost.per_logit_row else tokens
            if not rows:
                continue
            reading = cost.weight_bytes / (eff.linear_bandwidth * machine.dram_bandwidth)
            share = eff.linear_macs[cost.mac_dtype]
            products = rows * cost.token_macs / (share * machine.macs[cost.mac_dtype])
            longest = max(reading, products)
            if name in eff.curves:
                longest = max(0.0, interpolate(eff.curves[name], rows) - eff.op_seconds)
            if reading >= products:
                memory += count * longest
            else:
                compute += count * longest
        for _, count, cost in self._rest:
            rows = logit_rows if cost.per_logit_row else tokens
            moved = rows * cost.token_bytes
            memory += count * moved / (eff.activation_bandwidth * machine.dram_bandwidth)
        self._by_shape[key] = memory, compute
        return memory, compute

    @property
    def weight_bytes(self) -> float:
        return sum(count * cost.weight_bytes for _, count, cost in self._linear)

    def marginal(self, context: int) -> tuple[float, float]:
        """Seconds that one more decoding sequence of ``context`` tokens adds when the step waits
        for arithmetic, and what its keys and values add when it waits for memory."""
        machine, eff = self.machine, self.efficiency
        products = reading = 0.0
        for name, count, cost in self._linear:
            peak = eff.linear_macs[cost.mac_dtype] * machine.macs[cost.mac_dtype]
            one = cost.token_macs / peak
            if name in eff.curves:
                rows, seconds = eff.curves[name][-1]
                one = seconds / rows
            products += count * one
        for _, count, cost in self._attention:
            seen = count * cost.visible(context)
            peak = eff.attention_macs * machine.macs[cost.mac_dtype]
            products += seen * cost.context_macs / peak
            bandwidth = eff.attention_bandwidth * machine.dram_bandwidth
            reading += seen * cost.context_bytes / bandwidth
        for _, count, cost in self._rest:
            bandwidth = eff.activation_bandwidth * machine.dram_bandwidth
            products += count * cost.token_bytes / bandwidth
        return products + eff.sequence_seconds, reading
