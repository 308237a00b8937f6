"""What ``continuous`` and ``static`` do in particular."""

from __future__ import annotations

from pyllmlite.testing import SimulatedEngine
from pyllmlite_plugins.scheduler.continuous import Continuous
from pyllmlite_plugins.scheduler.static import Static


def ids(report):
    return [(seq.id, count) for seq, count in report.ran]


def test_prefill_is_cut_and_decodes_go_first():
    engine = SimulatedEngine(Continuous(), max_num_batched_tokens=10)
    engine.add(4, 9)
    engine.step()
    engine.add(25, 2)
    assert ids(engine.step()) == [(0, 1), (1, 9)]
    assert ids(engine.step()) == [(0, 1), (1, 9)]
    assert ids(engine.step()) == [(0, 1), (1, 7)]
    assert ids(engine.step()) == [(0, 1), (1, 1)]


def test_the_latest_started_gives_way():
    engine = SimulatedEngine(Continuous(), num_blocks=4, block_size=4)
    first, second = engine.add(8, 8), engine.add(7, 8)
    engine.step()
    report = engine.step()
    assert report.preempted == [second] and ids(report) == [(0, 1)]
    assert second.preemptions == 1 and second.num_computed == 0
    while first.num_output_tokens < 8:
        assert [i for i, _ in ids(engine.step())] == [0]
    engine.run_until_idle()
    assert second.num_output_tokens == 8


def test_nobody_starts_in_a_step_that_preempts():
    engine = SimulatedEngine(Continuous(), num_blocks=4, block_size=4)
    engine.add(8, 8)
    engine.add(7, 8)
    engine.step()
    engine.add(1, 1)
    report = engine.step()
    assert report.preempted and ids(report) == [(0, 1)]


def test_priority_then_arrival():
    engine = SimulatedEngine(Continuous(), max_num_seqs=1)
    order = [engine.add(2, 1, priority=p).id for p in (1, 0, 1, -1)]
    engine.run_until_idle()
    assert [s.id for s in engine.finished] == [order[3], order[1], order[0], order[2]]


def test_the_least_urgent_gives_way_first():
    engine = SimulatedEngine(Continuous(), num_blocks=4, block_size=4)
    slow, urgent = engine.add(8, 8, priority=1), engine.add(7, 8, priority=0)
    engine.step()
    assert engine.step().preempted == [slow]
    assert urgent.preemptions == 0


def test_a_big_request_is_not_passed_by_for_ever():
    engine = SimulatedEngine(Continuous(), num_blocks=4, block_size=4)
    engine.add(4, 9)
    engine.step()
    big = engine.add(13, 1)
    small = engine.add(1, 1)
    engine.run_until_idle()
    assert [s.id for s in engine.finished][1:] == [big.id, small.id]


def test_static_takes_nobody_in_until_the_batch_has_ended():
    engine = SimulatedEngine(Static(), max_num_seqs=4)
    long, short = engine.add(4, 12), engine.add(4, 2)
    for _ in range(3):
        engine.step()
    late = engine.add(4, 1)
    while long.finish_reason is None:
        assert late.row < 0
        engine.step()
    assert short.finish_reason
    engine.step()
    assert late.finish_reason


def test_static_fills_its_batch_over_several_steps():
    engine = SimulatedEngine(Static(), max_num_seqs=3, max_num_batched_tokens=10)
    for _ in range(4):
        engine.add(12, 3)
    for _ in range(4):
        engine.step()
    assert [s.num_output_tokens for s in engine.running] == [1, 1, 1]
    assert len(engine.waiting) == 1
    assert ids(engine.step()) == [(0, 1), (1, 1), (2, 1)]
    engine.run_until_idle()
