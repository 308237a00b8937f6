"""The suites find what they are there to find: strategies with one fault each."""

from __future__ import annotations

import numpy as np
import pytest

from pyllmlite.hooks.decoder import Constraint, Decoder, Proposer
from pyllmlite.hooks.scheduler import Scheduler
from pyllmlite.testing import (
    CacheConformance,
    ConstraintConformance,
    SimulatedEngine,
    check_strategy,
)
from pyllmlite.testing.cache import CacheModel, needs_for
from pyllmlite_plugins.attention.reference import Reference
from pyllmlite_plugins.cache.paged import Paged
from pyllmlite_plugins.decoder.sample import Sample
from pyllmlite_plugins.quantizer.rtn import RoundToNearest
from pyllmlite_plugins.scheduler.continuous import Continuous


def fails(strategy, words):
    with pytest.raises(AssertionError, match=words):
        check_strategy(strategy)


def test_healthy_strategies_pass():
    check_strategy(Continuous)
    check_strategy(Sample)
    with pytest.raises(ValueError, match="no suite"):
        check_strategy(type("X", (), {"contract": "x", "name": "x"}))


# -- schedulers -------------------------------------------------------------------------------
class Lazy(Continuous):
    """Starts nobody while somebody runs, and never lets go of the cache."""

    name = "lazy"

    def schedule(self, step):
        for seq in list(step.running) or list(step.waiting):
            step.run(seq)


class ShortestFirst(Scheduler):
    """Starves long prompts: the shortest one that fits always goes first, and evicts."""

    name = "shortest-first"

    def schedule(self, step):
        for seq in list(step.running):
            if seq.num_prompt_tokens > 60 and step.waiting:
                step.preempt(seq)
            else:
                step.run(seq)
        for seq in sorted(step.waiting, key=lambda s: s.num_prompt_tokens):
            step.run(seq)


class PassesBy(Continuous):
    """Lets small requests pass a big one for which the cache has no room yet."""

    name = "passes-by"

    def schedule(self, step):
        for seq in [*step.running, *step.waiting]:
            if step.run(seq) == 0 and step.blocked_by_cache(seq) and seq.row >= 0:
                step.preempt(seq)


class RunsTheDead(Continuous):
    """Remembers sequences, which is what ``step`` is for."""

    name = "runs-the-dead"

    def __init__(self):
        self.known = []

    def schedule(self, step):
        self.known += [s for s in step.waiting if s not in self.known]
        for seq in self.known:
            step.run(seq)


class Meddles(Continuous):
    """Writes to a sequence, which only the engine may."""

    name = "meddles"

    def schedule(self, step):
        super().schedule(step)
        for seq in step.running:
            seq.token_ids.append(1)


@pytest.mark.parametrize(
    "strategy, words",
    [
        (Lazy, "ran nothing|never ended|are left"),
        (ShortestFirst, "did not end|ran nothing|are left|tokens were computed"),
        (PassesBy, "test_no_starvation"),
        (RunsTheDead, "has ended"),
        (Meddles, "changed"),
    ],
)
def test_broken_schedulers(strategy, words):
    fails(strategy, words)


def test_nameless_strategy_is_refused_by_the_registry():
    fails(type("Loud", (Continuous,), {"name": "LOUD", "__doc__": "x"}), "test_registers: .*LOUD")
    fails(type("Old", (Continuous,), {"contract_version": 7, "__doc__": "x"}), "version 7")


def test_simulator_refuses_what_can_never_fit():
    with pytest.raises(ValueError, match="does not fit"):
        SimulatedEngine(Continuous(), num_blocks=2, block_size=4).add(8, 1)


# -- caches -----------------------------------------------------------------------------------
class NoCopy(Paged):
    """Forgets its copies."""

    name = "no-copy"

    def take_copies(self, group):
        super().take_copies(group)
        return []


class WrongHit(Paged):
    """Says that it has a token more than it does."""

    name = "wrong-hit"

    def acquire(self, seq_id, row, token_ids, salt=0):
        hit = super().acquire(seq_id, row, token_ids, salt)
        return min(hit + 1, len(token_ids) - 1) if hit else hit


class IgnoresSalt(Paged):
    """Shares across salts."""

    name = "ignores-salt"

    def acquire(self, seq_id, row, token_ids, salt=0):
        return super().acquire(seq_id, row, token_ids)


class Leaks(Paged):
    """Keeps a block of every forked child."""

    name = "leaks"

    def fork(self, parent_id, child_id, row):
        super().fork(parent_id, child_id, row)
        self._pools[0].refs[self._held[child_id].blocks[0][0]] += 1


@pytest.mark.parametrize("cls", [NoCopy, WrongHit, IgnoresSalt, Leaks])
def test_broken_caches(cls):
    needs = needs_for((None,), 320)
    model = CacheModel(cls(needs), needs, 1)
    with pytest.raises(AssertionError):
        for _ in range(3000):
            model.one()
        model.finish()


class SwapsNothingBack(Paged):
    """Takes blocks for what was swapped out, and leaves them as they are."""

    name = "swaps-nothing-back"

    def swap_in(self, seq_id, row, token_ids, num_tokens):
        before = [list(copies) for copies in self._copies]
        done = super().swap_in(seq_id, row, token_ids, num_tokens)
        self._copies = before
        return done


class SharesTooEarly(Paged):
    """Gives swap space back before the copies out of it are made, and takes it for others first."""

    name = "shares-too-early"

    def take_copies(self, group):
        return sorted(super().take_copies(group), key=lambda pair: -pair[1])


@pytest.mark.parametrize("cls", [SwapsNothingBack, SharesTooEarly])
def test_broken_swap_spaces(cls):
    needs = needs_for((None,), 320, swap_bytes=5000)
    model = CacheModel(cls(needs), needs, 1)
    with pytest.raises(AssertionError, match="holds another token's KV"):
        for _ in range(3000):
            model.one()


def test_a_cache_that_drops_its_sinks():
    class Drops(Paged):
        """Declares sinks and lets them go with the window."""

        name = "drops"

        def __init__(self, needs):
            super().__init__(needs)
            self._kept = [kept._replace(sinks=0) for kept in self._kept]

    needs = needs_for((24,), 400, sinks=20)
    model = CacheModel(Drops(needs), needs, 1)
    with pytest.raises(AssertionError, match="position [0-9]+ has no block"):
        for _ in range(3000):
            model.one()


def test_the_random_histories_reach_the_rare_paths():
    needs = needs_for((None,), 320)
    model = CacheModel(Paged(needs), needs, 1)
    for _ in range(3000):
        model.one()
    stats = model.cache.stats()
    assert model.refused > 100
    assert min(stats[key] for key in ("hit_tokens", "evictions", "copies", "waits")) > 0


def test_cache_suite_leaves_out_what_is_not_supported():
    class NoWindows(Paged):
        """Refuses windows."""

        name = "no-windows"

        @classmethod
        def supports(cls, need):
            return "no windows" if any(g.window for g in need.groups) else None

    suite = CacheConformance()
    suite.strategy = NoWindows
    assert suite.supported((None, 20), 100) is None
    suite.test_random_operations_with_windows()
    suite.test_sizes()


# -- the others -------------------------------------------------------------------------------
class HalfScale(RoundToNearest):
    """Scales that are too small."""

    name = "half-scale"

    def quantize(self, shape, weight, calibration=None):
        made = super().quantize(shape, weight, calibration)
        made.scales = made.scales / np.float16(2)
        return made


def test_broken_quantizer():
    fails(HalfScale, "relative error|off by")


class Unscaled(Reference):
    """Forgets the soft-cap."""

    name = "unscaled"

    def add_ops(self, sink, layer, qkv, out, kv):
        from dataclasses import replace

        super().add_ops(sink, replace(layer, softcap=0.0), qkv, out, kv)


class AbsoluteSinks(Reference):
    """Meets its sinks at positions within the sequence."""

    name = "absolute-sinks"

    def add_ops(self, sink, layer, qkv, out, kv):
        from dataclasses import replace

        super().add_ops(sink, replace(layer, rotary_dim=0), qkv, out, kv)


class Sinkless(Reference):
    """Declares that it reads sinks, and does not."""

    name = "sinkless"

    def add_ops(self, sink, layer, qkv, out, kv):
        from dataclasses import replace

        super().add_ops(sink, replace(layer, sinks=0), qkv, out, kv)


def test_broken_attention():
    fails(Unscaled, "test_all_together|test_softcap")
    fails(AbsoluteSinks, "test_sinks")
    fails(Sinkless, "test_sinks")


class Twice(Decoder):
    """Appends everything twice, behind the end too."""

    name = "twice"

    def advance(self, seq, result, actions):
        actions.append(seq, result.tokens)
        actions.append(seq, result.tokens)


class Headstrong(Decoder):
    """Takes the best token, allowed or not."""

    name = "headstrong"

    def sampling(self, seq):
        return {"num_logprobs": 1}

    def advance(self, seq, result, actions):
        actions.append(seq, [result.top(0)[0][0]])


class TooMany(Proposer):
    """Proposes more than it may."""

    name = "too-many"

    def propose(self, seq, max_tokens):
        return [1] * (max_tokens + 1)


def test_broken_decoders():
    fails(Twice, "not live")
    fails(TooMany, "allowed")
    fails(Headstrong, "a forbidden token was taken")


class Counts(Constraint):
    """Allows token n at the n-th place."""

    name = "counts"
    rolls_back = True

    @classmethod
    def applies(cls, params):
        return "count" in params.extra_args

    def open(self, seq):
        return [0]

    def mask(self, state):
        bits = np.zeros(2, np.uint32)
        bits[state[0] // 32] = np.uint32(1 << (state[0] % 32))
        return bits

    def accept(self, state, token_id):
        state[0] += 1

    def rollback(self, state, num_tokens):
        state[0] -= num_tokens if self.rolls_back else 0

    def fork(self, state):
        return list(state)


class TestCounts(ConstraintConformance):
    strategy = Counts
    params = {"extra_args": {"count": True}}


def test_broken_constraint():
    suite = TestCounts()
    suite.strategy = type("Stuck", (Counts,), {"rolls_back": False, "__doc__": "x"})
    with pytest.raises(AssertionError, match="rollback"):
        suite.test_rollback()
