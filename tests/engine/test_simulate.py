"""Traces and the simulated engine: by hand where a hand can follow, and what strategies are for."""

import random
from collections import Counter
from statistics import median

import pytest

from pyllmlite.core.errors import ConfigError
from pyllmlite.core.spec import LayerSpec, ModelSpec, NormSpec
from pyllmlite.engine.simulate import (
    check_fits,
    fair_shares,
    jain_index,
    replay,
    simulated_engine,
    together,
)
from pyllmlite.engine.trace import Arrival, arrival_times, at_once, lengths, make_trace
from pyllmlite.hooks.scheduler import Scheduler

SPEC = ModelSpec(
    architecture="simulated", hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, intermediate_size=128, vocab_size=1000, max_position_embeddings=8192,
    norm=NormSpec("rms", 1e-5), activation="silu", gated=True,
    layers=(LayerSpec(), LayerSpec()),
)  # fmt: skip
PER_TOKEN = SPEC.kv_bytes_per_token(2)


def flat(counts, contexts, rows):
    """Ten milliseconds, and one for every 64 tokens more than there are sequences: a machine whose
    knee lies at 64."""
    return 10e-3 + 1e-3 * (sum(counts) - len(counts)) / 64


def engine(scheduler="continuous", cost=flat, **options):
    sizes = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_model_len": 4608,
        "kv_bytes": PER_TOKEN * 40_000,
    }
    made, clock, _ = simulated_engine(SPEC, scheduler, cost, **{**sizes, **options})
    return made, clock


def play(trace, scheduler="continuous", **options):
    made, clock = engine(scheduler, **options)
    found = replay(made, trace, clock)
    made.check_integrity()
    return found


# -- traces ------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["fixed:7", "7"])
def test_fixed_lengths(text):
    assert {lengths(text)(random.Random(i)) for i in range(20)} == {7}


def test_lengths_stay_inside_and_reach_both_ends():
    rng = random.Random(0)
    for kind in ("uniform", "log-uniform"):
        drawn = [lengths(f"{kind}:2:5")(rng) for _ in range(2000)]
        assert set(drawn) == {2, 3, 4, 5}
    drawn = [lengths("log-uniform:16:256")(rng) for _ in range(4000)]
    assert 60 <= median(drawn) <= 68  # the geometric mean, not 136


@pytest.mark.parametrize(
    "text", ["", "0", "fixed:0", "uniform:5", "uniform:5:2", "normal:1:2", "a"]
)
def test_lengths_that_are_none(text):
    with pytest.raises(ConfigError, match="log-uniform:LOW:HIGH"):
        lengths(text)


def test_arrivals():
    rng = random.Random(3)
    assert arrival_times("all", 3, 0.0, rng) == [0, 0, 0]
    poisson = arrival_times("poisson", 20_000, 5.0, rng)
    assert poisson == sorted(poisson)
    assert poisson[-1] == pytest.approx(20_000 / 5, rel=0.05)
    bursts = arrival_times("bursty:8", 20_000, 5.0, rng)
    assert bursts[-1] == pytest.approx(20_000 / 5, rel=0.1)
    assert set(Counter(bursts).values()) == {8}
    for bad in ("bursty", "bursty:0", "poisson:3", "daily"):
        with pytest.raises(ConfigError, match="poisson or bursty:N"):
            arrival_times(bad, 1, 1.0, rng)
    with pytest.raises(ConfigError, match="above 0"):
        arrival_times("poisson", 1, 0.0, rng)


def test_a_trace_is_the_same_at_any_rate_and_shares_prefixes():
    asked = {"shared_prefix": 5, "prefix_groups": 2, "clients": 3, "seed": 4}
    draws = (lengths("uniform:1:9"), lengths("2"))
    slow = make_trace(50, *draws, arrivals="poisson", rate=1.0, **asked)
    fast = make_trace(50, *draws, arrivals="poisson", rate=10.0, **asked)
    assert at_once(slow) == at_once(fast)
    assert [a.time for a in slow] == pytest.approx([10 * b.time for b in fast])
    assert len({a.prompt[:5] for a in slow}) == 2
    assert {a.client for a in slow} == {"client0", "client1", "client2"}


def test_jain():
    assert jain_index([2.0, 2.0, 2.0]) == 1.0
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain_index([0.0]) == 1.0


# -- one request by hand ---------------------------------------------------------------------------
def test_times_of_one_request():
    found = play([Arrival(2.0, (1,) * 65, 3)])
    prefill = 10e-3 + 1e-3  # 65 tokens of one sequence
    assert found.ttft == pytest.approx([prefill])
    assert found.latency == pytest.approx([prefill + 2 * 10e-3])
    assert found.tpot == pytest.approx([10e-3])
    assert found.gaps == pytest.approx([10e-3])
    assert found.makespan == pytest.approx(2.0 + prefill + 20e-3)
    assert (found.steps, found.prefill_tokens, found.output_tokens) == (3, 65, 3)
    assert found.usual_step == pytest.approx(10e-3)


def test_dynamic_waits_for_its_window_on_the_simulated_clock():
    found = play([Arrival(0.0, (1,), 1)], "dynamic", extra={"batch_window": 0.25})
    assert found.ttft == pytest.approx([0.25 + 10e-3])


def test_a_scheduler_given_as_a_class():
    class OneByOne(Scheduler):
        name = "one-by-one"

        def schedule(self, step):
            for seq in step.running or step.waiting[:1]:
                step.run(seq)

    found = play([Arrival(0.0, (1,), 4)] * 5, OneByOne)
    assert found.scheduler == "one-by-one"
    assert found.makespan == pytest.approx(5 * 4 * 10e-3)


def test_replicas_as_one():
    trace = [Arrival(0.0, (1,) * 8, 3 + i) for i in range(4)]
    parts = [play(trace[i::2]) for i in range(2)]
    whole = together(parts)
    assert whole.requests == 4 and whole.output_tokens == 3 + 4 + 5 + 6
    assert whole.makespan == max(part.makespan for part in parts)
    assert sorted(whole.latency) == sorted(parts[0].latency + parts[1].latency)
    assert whole.steps == parts[0].steps + parts[1].steps


def test_a_trace_that_does_not_fit():
    with pytest.raises(ConfigError, match="a request of 12 tokens, max_model_len is 10"):
        check_fits([Arrival(0, (1,) * 10, 2)], 10)


# -- what the strategies are for -------------------------------------------------------------------
def mixed(arrivals="all", rate=1.0, count=64):
    return make_trace(
        count, lengths("64"), lengths("log-uniform:16:256"), arrivals=arrivals, rate=rate, seed=1
    )


def test_continuous_has_more_throughput_than_static():
    trace = mixed()
    continuous, static = play(trace), play(trace, "static")
    assert continuous.output_tokens == static.output_tokens
    assert continuous.tokens_per_second >= 1.5 * static.tokens_per_second


def test_continuous_has_less_latency_than_dynamic_under_load():
    capacity = play(mixed(count=400)).requests_per_second
    trace = mixed("poisson", 0.8 * capacity, 400)
    assert median(play(trace).latency) <= 0.5 * median(play(trace, "dynamic").latency)


def test_chunked_prefill_bounds_the_gap_between_two_tokens():
    """A prompt of 4,000 tokens arrives while 15 decode, on a machine that is bound by arithmetic
    from 4 tokens on."""

    def cost(counts, contexts, rows):
        return 3e-3 + 0.75e-3 * sum(counts)

    trace = [Arrival(0.0, (i,) * 8, 400) for i in range(15)]
    trace.append(Arrival(1.0, (99,) * 4000, 1))
    whole = play(trace, cost=cost)
    assert max(whole.gaps) > 20 * whole.usual_step
    chunked = play(trace, cost=cost, extra={"max_prefill_tokens_per_step": 32})
    assert max(chunked.gaps) < 3 * chunked.usual_step
    paced = play(trace, cost=cost, extra={"max_decode_slowdown": 2.5})
    assert max(paced.gaps) < 3 * paced.usual_step


def test_a_shared_prefix_is_computed_once():
    trace = make_trace(32, lengths("16"), lengths("8"), shared_prefix=512, seed=2)
    assert play(trace).prefill_tokens == 512 + 32 * 16
    without = play(trace, prefix_caching=False)
    assert without.prefill_tokens == 32 * (512 + 16)
    assert without.makespan > 1.5 * play(trace).makespan


def test_a_small_cache_preempts_and_everybody_ends():
    trace = mixed()
    found = play(trace, kv_bytes=PER_TOKEN * 1024, max_model_len=512)
    assert found.preemptions > 0
    assert found.output_tokens == sum(request.output for request in trace)


def test_clients_are_served_more_alike_by_fairness():
    """Three clients that send 6 : 3 : 2; all are there from the start."""
    trace = make_trace(220, lengths("64"), lengths("64"), arrivals="all", clients=3, seed=5)
    assert play(trace).jain > 0.98
    assert play(trace, extra={"fair_clients": False}).jain < 0.96


def test_nobody_is_treated_unfairly_on_an_empty_machine():
    trace = [Arrival(float(i), (1,) * 8, 4, "ab"[i % 5 == 0]) for i in range(20)]
    assert play(trace).jain == pytest.approx(1.0)


def test_fair_shares_by_hand():
    wishes = {"a": 2.0, "b": 10.0, "c": 5.0}
    assert fair_shares(12.0, wishes) == {"a": 2.0, "b": 5.0, "c": 5.0}
    assert fair_shares(17.0, wishes) == wishes
    assert fair_shares(3.0, wishes) == {"a": 1.0, "b": 1.0, "c": 1.0}
