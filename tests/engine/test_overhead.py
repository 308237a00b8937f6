"""The measurement measures what it says (not how fast)."""

import pytest

pytest.importorskip("pyllmlite._native")

from pyllmlite.engine.overhead import measure_overhead


def test_figures_add_up():
    result = measure_overhead((1, 3), steps=4, rounds=2)
    assert [r["batch"] for r in result["results"]] == [1, 3]
    for r in result["results"]:
        assert r["steps"] == 8
        assert 0 < r["native_us"] < r["step_us"] and 0 < r["engine_us"] < r["step_us"]
        assert r["step_us_p10"] <= r["step_us"]
