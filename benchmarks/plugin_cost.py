"""What a step costs with strategies of a third party beside the built-in ones.

    python benchmarks/plugin_cost.py

Registers a scheduler, a cache and a decoder under other names, from a distribution of their own,
and times the steps of the model that costs nothing (as ``pyllmlite bench overhead``), in turn.
"""

from __future__ import annotations

import statistics
import types

from pyllmlite import Decoder, Scheduler, hookimpl
from pyllmlite.engine.overhead import BATCHES, measure_overhead
from pyllmlite.hooks.registry import Registry
from pyllmlite_plugins.cache.paged import Paged

ROUNDS = 3


class TheirScheduler(Scheduler):
    """Iteration-level, without preemption: what fits runs."""

    name = "their-scheduler"

    def schedule(self, step) -> None:
        for seq in step.running:
            step.run(seq)
        for seq in step.waiting:
            if not step.run(seq):
                break


class TheirDecoder(Decoder):
    name = "their-decoder"

    def advance(self, seq, result, actions) -> None:
        actions.append(seq, result.tokens)


class TheirCache(Paged):
    name = "their-cache"
    priority = -1


def main() -> None:
    module = types.ModuleType("their_plugin")
    module.pyllmlite_schedulers = hookimpl(
        lambda: [TheirScheduler], specname="pyllmlite_schedulers"
    )
    module.pyllmlite_decoders = hookimpl(lambda: [TheirDecoder], specname="pyllmlite_decoders")
    module.pyllmlite_caches = hookimpl(lambda: [TheirCache], specname="pyllmlite_caches")
    Registry.load().register(module, "their-plugin")
    setups = {
        "built-in": {},
        "their scheduler": {"scheduler": "their-scheduler"},
        "their cache": {"cache": "their-cache"},
        "their decoder": {"decoder": "their-decoder"},
    }
    figures: dict[str, list[list[float]]] = {name: [] for name in setups}
    for _ in range(ROUNDS):
        for name, options in setups.items():
            results = measure_overhead(rounds=3, **options)["results"]
            figures[name].append([result["step_us"] for result in results])
    print(f"{'µs a step at batch':<18}" + "".join(f"{batch:>9}" for batch in BATCHES))
    for name, runs in figures.items():
        medians = [statistics.median(run[i] for run in runs) for i in range(len(BATCHES))]
        print(f"{name:<18}" + "".join(f"{median:>9.1f}" for median in medians))


if __name__ == "__main__":
    main()
