"""The roofline against brute force, and against figures worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllmlite.runtime.cost import OpCost
from pyllmlite.runtime.program import OpEntry
from pyllmlite.sizing import Machine, Step, Work, decode, limit, prefill, work
from pyllmlite.sizing.roofline import keys_read, pairs

MACHINE = Machine(
    isa="scalar",
    threads=2,
    cache_bytes=1000,
    dram_bandwidth=10.0,
    cache_bandwidth=100.0,
    macs={"int8": 8.0, "bf16": 4.0, "f32": 2.0},
)


def entry(**cost):
    return OpEntry("op", "op", (), OpCost(**cost))


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 60))
def test_pairs_and_keys_are_what_each_token_sees(new, before, window):
    context = before + new
    seen = [
        range(max(0, at - (window or context) + 1), at + 1) for at in range(before, context)
    ]
    assert pairs(new, context, window) == sum(len(keys) for keys in seen)
    assert keys_read(new, context, window) == len({key for keys in seen for key in keys})


def test_steps():
    assert decode(3, 7) == Step(((1, 7),) * 3, 3)
    assert prefill(5, 9) == Step(((5, 5), (9, 9)), 2)


def test_work_of_a_small_model():
    ops = [
        entry(weight_bytes=100, token_bytes=1e9, token_macs=200, mac_dtype="int8"),
        entry(context_bytes=6, context_macs=10, mac_dtype="bf16"),
        entry(context_bytes=6, context_macs=10, mac_dtype="bf16", window=2),
        entry(weight_bytes=50, token_macs=30, per_logit_row=True, mac_dtype="int8"),
        entry(token_bytes=7),
    ]
    two = work(ops, decode(2, 5))
    assert two.weight_bytes == 150
    assert two.kv_bytes == 2 * 6 * (5 + 2)
    assert two.bytes == two.weight_bytes + two.kv_bytes
    assert two.macs == {"int8": 2 * 200 + 2 * 30, "bf16": 2 * 10 * (5 + 2)}
    prompt = work(ops, prefill(4))
    assert prompt.kv_bytes == 6 * (4 + 4)
    assert prompt.macs == {"int8": 4 * 200 + 30, "bf16": 10 * (1 + 2 + 3 + 4 + 1 + 2 + 2 + 2)}
    assert work(ops, Step((), 0)) == Work(150, 0, {})


@pytest.mark.parametrize(
    ("bytes", "macs", "seconds", "bound"),
    [
        (2000, {}, 200, "dram"),
        (1000, {}, 10, "cache"),  # what fits the cache is held to the cache's bandwidth
        (1001, {}, 100.1, "dram"),
        (2000, {"int8": 1600, "f32": 2}, 201, "compute"),  # the dtypes' times add up
        (0, {}, 0, "cache"),
    ],
)
def test_limit(bytes, macs, seconds, bound):
    found = limit(Work(bytes / 2, bytes / 2, macs), MACHINE)
    assert found.seconds == pytest.approx(seconds)
    assert found.bound == bound
    assert found.dram_seconds == bytes / 10
    assert found.cache_seconds == bytes / 100


def test_an_unknown_cache_holds_nothing():
    machine = Machine("scalar", 1, 0, 10.0, None, MACHINE.macs)
    found = limit(Work(5, 0), machine)
    assert (found.seconds, found.cache_seconds, found.in_cache) == (0.5, None, False)
