"""A plan: what a machine holds of a model, where its best batch size lies, what a token costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pyllmlite.core.spec import ModelSpec
from pyllmlite.sizing.footprint import (
    KV,
    Weights,
    kv_of,
    longest_that_fits,
    planned_ops,
    sequences_that_fit,
)
from pyllmlite.sizing.machine import Machine
from pyllmlite.sizing.roofline import Step, decode
from pyllmlite.sizing.steptime import Efficiency, StepModel, Timing

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Row:
    """A decode step of ``batch`` sequences: what it takes, and what it brings in."""

    batch: int
    timing: Timing
    kv_bytes: float
    fits: bool
    cost_per_million: float | None

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.timing.seconds


@dataclass(frozen=True)
class Knee:
    """Where moving bytes and doing arithmetic take equally long: B*.

    Attributes:
        weights_only: bytes per weight x peak / bandwidth, the peak in multiply-accumulates (one a
            weight and sequence): ``weight bytes / bandwidth = B x products a token / peak``.
        with_kv: The same when every sequence reads its keys and values too,
            ``weight seconds / (product seconds - KV seconds)``; None: its KV takes
            longer than its arithmetic, so that no batch reaches the peak.
        reached: With what kernels reach of both; None likewise.
    """

    weights_only: float
    with_kv: float | None
    reached: float | None


@dataclass(frozen=True)
class Plan:
    """All that is known before a model is loaded.

    Attributes:
        weights: The format that is planned with; ``formats``: the others beside it.
        memory_bytes: What weights and KV may take together.
        context: Tokens that each sequence has.
        max_sequences: Of ``context`` tokens that fit; ``longest``: tokens of one that does.
        prefill_seconds: Of a prompt of ``context`` tokens, alone.
    """

    spec: ModelSpec
    where: str
    machine: Machine
    efficiency: Efficiency
    weights: Weights
    formats: tuple[Weights, ...]
    kv: KV
    memory_bytes: float
    context: int
    max_sequences: int
    longest: int
    prefill_seconds: float
    knee: Knee
    rows: tuple[Row, ...]
    model: StepModel = field(repr=False)

    @property
    def fits(self) -> bool:
        return self.weights.nbytes < self.memory_bytes

    @property
    def best(self) -> Row | None:
        """The row with the most tokens per second among those that fit."""
        fitting = [row for row in self.rows if row.fits]
        return max(fitting, key=lambda row: row.tokens_per_second) if fitting else None


def cost_per_million(tokens_per_second: float, price_per_hour: float) -> float:
    """Of a million generated tokens, in the price's currency."""
    return price_per_hour / 3600 / tokens_per_second * 1e6


def knee_of(model: StepModel, context: int) -> Knee:
    """B* by bandwidth and peak as they are, and by what kernels reach of them."""
    machine = model.machine
    weight_seconds = model.weight_bytes / machine.dram_bandwidth
    products, _ = _ideal(model, 0)
    both, kv_seconds = _ideal(model, context)
    reached = model.marginal(context)
    floor = model.step(decode(1, context)).seconds - sum(reached)
    # Arithmetic of attention counts with the arithmetic, its reading with the reading.
    room = both - kv_seconds
    slope = max(reached[0], reached[1])
    return Knee(
        weights_only=weight_seconds / products,
        with_kv=weight_seconds / room if room > 0 else None,
        reached=floor / slope if reached[0] > reached[1] and floor > 0 else None,
    )


def _ideal(model: StepModel, context: int) -> tuple[float, float]:
    """Seconds of arithmetic, and of reading KV, that a sequence adds at the machine's peaks."""
    machine = model.machine
    products = kv = 0.0
    for _, count, cost in model.ops:
        seen = cost.visible(context) if cost.context_bytes else 0
        macs = cost.token_macs + seen * cost.context_macs
        products += count * macs / machine.macs[cost.mac_dtype]
        kv += count * seen * cost.context_bytes / machine.dram_bandwidth
    return products, kv


def knee_in(times: Sequence[tuple[int, float]]) -> float | None:
    """B* as a sweep of ``(batch, seconds of a step)`` shows it: where the flat beginning, the step
    of one sequence, meets the line through the two largest batches' extra time.

    None: fewer than three batches, or the times do not grow.
    """
    points = sorted(times)
    if len(points) < 3:
        return None
    (b1, t1), (b2, t2) = points[-2], points[-1]
    slope = (t2 - t1) / (b2 - b1)
    if slope <= 0:
        return None
    return points[0][1] / slope


def make_plan(
    spec: ModelSpec,
    weights: Weights,
    machine: Machine,
    efficiency: Efficiency,
    memory_bytes: float,
    *,
    where: str = "",
    formats: Sequence[Weights] = (),
    context: int = 1024,
    kv_dtype: str = "bf16",
    batches: Sequence[int] = BATCHES,
    price_per_hour: float | None = None,
) -> Plan:
    """Work everything out; nothing is loaded or run."""
    kv = kv_of(spec, kv_dtype)
    model = StepModel(planned_ops(spec, weights, kv_dtype), machine, efficiency)
    free = memory_bytes - weights.nbytes
    rows = []
    for batch in batches:
        timing = model.step(decode(batch, context))
        rate = batch / timing.seconds
        needed = kv.bytes(context, batch)
        price = None if price_per_hour is None else cost_per_million(rate, price_per_hour)
        rows.append(Row(batch, timing, needed, needed <= free, price))
    return Plan(
        spec=spec,
        where=where,
        machine=machine,
        efficiency=efficiency,
        weights=weights,
        formats=tuple(formats),
        kv=kv,
        memory_bytes=memory_bytes,
        context=context,
        max_sequences=sequences_that_fit(kv, context, free),
        longest=longest_that_fits(kv, free, spec.max_position_embeddings),
        prefill_seconds=prefill_seconds(model, context),
        knee=knee_of(model, context),
        rows=tuple(rows),
        model=model,
    )


def prefill_seconds(model: StepModel, tokens: int, chunk: int = 512) -> float:
    """Of a prompt by itself, in chunks of a step's tokens."""
    total = 0.0
    for start in range(0, tokens, chunk):
        end = min(tokens, start + chunk)
        total += model.step(Step(((end - start, end),), int(end == tokens))).seconds
    return total


def as_dict(plan: Plan) -> dict[str, Any]:
    """Plain data, for ``--json``."""
    return {
        "where": plan.where,
        "peaks": {
            "bandwidth": plan.machine.dram_bandwidth,
            "macs": plan.machine.macs,
            "efficiency": asdict(plan.efficiency),
        },
        "memory_bytes": plan.memory_bytes,
        "weights": {
            one.name: {
                "bytes": one.nbytes,
                "bits_per_weight": one.bits_per_weight,
                "parts": one.by_part(),
                "fits": one.nbytes < plan.memory_bytes,
            }
            for one in (plan.weights, *plan.formats)
        },
        "format": plan.weights.name,
        "kv": {
            "dtype": plan.kv.dtype,
            "bytes_per_token": plan.kv.bytes_per_token,
            "bytes_per_token_mha": plan.kv.bytes_per_token * plan.kv.mha_factor,
            "bytes_per_sequence": plan.kv.sequence_bytes(plan.context),
        },
        "context": plan.context,
        "max_sequences": plan.max_sequences,
        "longest": plan.longest,
        "prefill_seconds": plan.prefill_seconds,
        "knee": {
            "weights_only": plan.knee.weights_only,
            "with_kv": plan.knee.with_kv,
            "reached": plan.knee.reached,
        },
        "batches": [
            {
                "batch": row.batch,
                "step_seconds": row.timing.seconds,
                "memory_seconds": row.timing.memory,
                "compute_seconds": row.timing.compute,
                "host_seconds": row.timing.host,
                "tokens_per_second": row.tokens_per_second,
                "kv_bytes": row.kv_bytes,
                "fits": row.fits,
                "cost_per_million": row.cost_per_million,
            }
            for row in plan.rows
        ],
    }
