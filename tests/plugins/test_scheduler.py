"""What ``continuous``, ``static`` and ``dynamic`` do in particular."""

from __future__ import annotations

import pytest

from pyllmlite.core.errors import ConfigError
from pyllmlite.testing import SimulatedEngine
from pyllmlite_plugins.scheduler.continuous import Continuous
from pyllmlite_plugins.scheduler.dynamic import Dynamic
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


# -- options ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("scheduler", "options", "words"),
    [
        (Continuous, {"max_prefill_tokens_per_step": 0}, "at least 1, got 0"),
        (Continuous, {"max_prefill_tokens_per_step": True}, "got True"),
        (Continuous, {"max_decode_slowdown": 1}, "above 1, got 1"),
        (Continuous, {"max_decode_slowdown": "2"}, "above 1"),
        (Continuous, {"fair_clients": 1}, "true or false"),
        (Dynamic, {"batch_size": 2.5}, "batch_size .* got 2.5"),
        (Dynamic, {"batch_window": -1}, "0 or more"),
        (Dynamic, {"batch_window": float("nan")}, "0 or more"),
    ],
)
def test_options_that_cannot_work(scheduler, options, words):
    with pytest.raises(ConfigError, match=words):
        SimulatedEngine(scheduler(), options=options)


# -- continuous: chunks ------------------------------------------------------------------------
def test_prompts_are_cut_short_only_while_somebody_decodes():
    engine = SimulatedEngine(Continuous(), options={"max_prefill_tokens_per_step": 6})
    engine.add(20, 4)
    assert ids(engine.step()) == [(0, 20)]  # nobody decodes: the whole budget
    engine.add(9, 1)
    engine.add(9, 1)
    assert ids(engine.step()) == [(0, 1), (1, 6)]
    assert ids(engine.step()) == [(0, 1), (1, 3), (2, 3)]
    assert ids(engine.step()) == [(0, 1), (2, 6)]
    engine.run_until_idle()


def test_a_prompt_takes_no_token_that_a_decode_needs():
    engine = SimulatedEngine(
        Continuous(), max_num_batched_tokens=4, options={"max_prefill_tokens_per_step": 64}
    )
    engine.add(1, 9, priority=1)
    engine.add(1, 9, priority=1)
    engine.step()
    engine.add(30, 1, priority=0)
    for _ in range(4):
        report = ids(engine.step())
        assert {(0, 1), (1, 1)} < set(report) and (2, 2) in report


def test_a_chunk_follows_what_the_clock_says():
    """A token takes 1 ms, a step 10 ms: twice the usual time is the usual step's tokens + 10."""
    engine = SimulatedEngine(
        Continuous(),
        max_num_seqs=8,
        max_num_batched_tokens=512,
        num_blocks=400,
        token_time=1e-3,
        options={"max_decode_slowdown": 2.0},
    )
    for _ in range(4):
        engine.add(4, 300)
    for _ in range(10):
        engine.step()
    engine.add(2000, 1)
    chunks, before = [], engine.now
    while engine.waiting or any(s.num_uncomputed > 1 for s in engine.running):
        report = engine.step()
        chunks.append(dict(ids(report)).get(4, 0))
        assert engine.now - before <= 2.3 * 14e-3
        before = engine.now
    assert max(chunks[2:]) <= 14 and min(chunks[2:-1]) >= 13


def test_a_chunk_grows_where_tokens_cost_nothing():
    engine = SimulatedEngine(
        Continuous(),
        max_num_batched_tokens=512,
        num_blocks=400,
        token_time=0.0,
        options={"max_decode_slowdown": 2.0},
    )
    engine.add(4, 300)
    for _ in range(10):
        engine.step()
    engine.add(1500, 1)
    chunks = [dict(ids(engine.step())).get(1, 0) for _ in range(7)]
    assert chunks == [16, 32, 64, 128, 256, 511, 493]


# -- continuous: clients -----------------------------------------------------------------------
def test_clients_share_however_many_requests_each_sends():
    def served(fair):
        engine = SimulatedEngine(Continuous(), max_num_seqs=2, options={"fair_clients": fair})
        for _ in range(30):
            engine.add(8, 8, client="many")
        for _ in range(10):
            engine.add(8, 8, client="few")
        while sum(s.request.client == "few" for s in engine.finished) < 10:
            engine.step()
        return sum(s.request.client == "many" for s in engine.finished)

    assert served(True) <= 12
    assert served(False) == 30


def test_a_client_that_comes_back_has_nothing_saved_up():
    engine = SimulatedEngine(Continuous(), max_num_seqs=1)
    for _ in range(20):
        engine.add(4, 8, client="steady")
    for _ in range(60):
        engine.step()
    for _ in range(10):
        engine.add(4, 8, client="new")
    done = len(engine.finished)
    for _ in range(8 * 8 + 8):
        engine.step()
    since = [s.request.client for s in engine.finished[done:]]
    assert 3 <= since.count("steady") <= 5  # in turn, not all of the new one's first


def test_priority_goes_before_fairness():
    engine = SimulatedEngine(Continuous(), max_num_seqs=1)
    order = [("a", 1), ("b", 0), ("a", 0), ("b", 1)]
    added = [engine.add(2, 1, priority=p, client=c) for c, p in order]
    engine.run_until_idle()
    assert {s.id for s in engine.finished[:2]} == {added[1].id, added[2].id}


def test_counters_of_clients_that_left_are_dropped():
    scheduler = Continuous()
    engine = SimulatedEngine(scheduler, max_num_seqs=2)
    for i in range(200):
        engine.add(1, 2, client=f"client{i}")
        engine.step()
    engine.run_until_idle()
    engine.add(1, 2, client="last")
    engine.step()
    assert len(scheduler._counters._served) == 1


# -- dynamic -----------------------------------------------------------------------------------
def test_dynamic_waits_for_its_batch_or_its_window():
    options = {"batch_size": 3, "batch_window": 1.0}
    engine = SimulatedEngine(Dynamic(), max_num_seqs=8, options=options)
    engine.add(4, 4)
    assert not engine.step().ran
    assert engine.scheduler.next_event(engine.now) == 1.0
    engine.add(4, 4)
    assert not engine.step().ran
    engine.add(4, 2)
    engine.add(4, 2)
    assert [i for i, _ in ids(engine.step())] == [0, 1, 2]  # three are enough, and are all it takes
    assert engine.scheduler.next_event(engine.now) is None
    while engine.running:
        assert 3 not in [i for i, _ in ids(engine.step())]  # nobody joins
    assert not engine.step().ran
    engine.now = 1.1
    assert ids(engine.step()) == [(3, 4)]


def test_dynamic_without_a_window_is_static():
    engines = [
        SimulatedEngine(Dynamic(), options={"batch_window": 0}),
        SimulatedEngine(Static()),
    ]
    for engine in engines:
        for i in range(20):
            engine.add(3 + i, 1 + i % 7)
    for _ in range(100):
        one, other = (ids(engine.step()) for engine in engines)
        assert one == other
