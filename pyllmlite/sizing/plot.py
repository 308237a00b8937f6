"""A plan as a picture: the roofline, and tokens per second over batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyllmlite.core.errors import ConfigError
from pyllmlite.sizing.plan import Plan
from pyllmlite.sizing.roofline import decode, work


def roofline_points(plan: Plan) -> list[tuple[float, float]]:
    """For each batch size (operations a byte, operations a second) of its decode step."""
    points = []
    for row in plan.rows:
        done = work(plan.model.entries, decode(row.batch, plan.context))
        operations = 2 * sum(done.macs.values())
        points.append((operations / done.bytes, operations / row.timing.seconds))
    return points


def draw(plan: Plan, path: str | Path, measured: Sequence[tuple[int, float]] = ()) -> None:
    """Two panels.  Left the roofline: bandwidth, the peak of the dtype that does most products, and
    the decode steps of the plan.  Right tokens per second, and ``measured`` (batch, seconds of a
    step) on top of both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure: Any
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    points = roofline_points(plan)
    done = work(plan.model.entries, decode(1, plan.context))
    dtype = max(done.macs, key=lambda name: done.macs[name])
    peak = 2 * plan.machine.macs[dtype]
    bandwidth = plan.machine.dram_bandwidth
    low, high = points[0][0] / 2, max(2 * points[-1][0], 4 * peak / bandwidth)
    ridge = peak / bandwidth
    left.plot([low, ridge, high], [low * bandwidth, peak, peak], "k-", label=f"peak ({dtype})")
    left.plot(*zip(*points, strict=True), "o-", label="predicted", ms=4)
    right.plot(
        [row.batch for row in plan.rows],
        [row.tokens_per_second for row in plan.rows],
        "o-",
        label="predicted",
        ms=4,
    )
    if measured:
        by_batch = []
        for batch, seconds in measured:
            its = work(plan.model.entries, decode(batch, plan.context))
            operations = 2 * sum(its.macs.values())
            by_batch.append((operations / its.bytes, operations / seconds))
        left.plot(*zip(*by_batch, strict=True), "x", label="measured", ms=8)
        rates = [(batch, batch / seconds) for batch, seconds in measured]
        right.plot(*zip(*rates, strict=True), "x", label="measured", ms=8)
    knees = (("B* at the peaks", plan.knee.with_kv), ("B* reached", plan.knee.reached))
    for (name, knee), style in zip(knees, (":", "--"), strict=True):
        if knee:
            right.axvline(knee, ls=style, color="grey", label=f"{name}: {knee:.1f}")
    if plan.rows[0].batch <= plan.max_sequences < plan.rows[-1].batch:
        right.axvspan(plan.max_sequences, plan.rows[-1].batch, alpha=0.15, color="red",
                      label="does not fit")  # fmt: skip
    for axes, x, y in (
        (left, "operations per byte", "operations per second"),
        (right, "sequences in a step", "tokens per second"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize="small")
    figure.suptitle(
        f"{plan.spec.architecture}, {plan.weights.name}, context {plan.context}, {plan.where}",
        fontsize="medium",
    )
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)
