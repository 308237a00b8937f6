"""``pyllmlite bench serve-sim``: its table, its JSON, what it refuses."""

import json

import pytest

ASKED = ("--requests", "12", "--output-lengths", "uniform:2:9", "--prompt-lengths", "8")


def sim(pyllmlite, model, *more, check=0):
    return pyllmlite("bench", "serve-sim", "-m", model, *ASKED, *more, check=check)


def test_beside_the_built_in_ones(pyllmlite, model):
    more = ("--gpu", "l4", "--arrivals", "poisson", "--load", "0.8", "--clients", "2", "--json")
    told = json.loads(sim(pyllmlite, model, *more).stdout)
    assert [row["scheduler"] for row in told["results"]] == ["continuous", "dynamic", "static"]
    assert told["capacity"] > 0
    for row in told["results"]:
        assert row["requests"] == 12 and 0 < row["jain"] <= 1
        assert 0 < row["ttft_p50"] <= row["latency_p50"] <= row["latency_max"]


def test_the_same_trace_gives_the_same_figures(pyllmlite, model):
    more = ("--gpu", "l4", "--long-prompt", "40", "--json")
    one, other = (json.loads(sim(pyllmlite, model, *more).stdout) for _ in range(2))
    assert one["results"] == other["results"]


def test_replicas_share_the_requests(pyllmlite, model):
    more = ("--gpu", "l4", "-s", "continuous", "--only", "--json")
    (one,) = json.loads(sim(pyllmlite, model, *more).stdout)["results"]
    (many,) = json.loads(sim(pyllmlite, model, *more, "--replicas", "4").stdout)["results"]
    assert many["requests"] == one["requests"] == 12
    assert many["makespan"] <= one["makespan"]


def test_real_time(pyllmlite, model):
    more = ("--real", "-s", "continuous", "--only", "--max-num-seqs", "4", "--json")
    (row,) = json.loads(sim(pyllmlite, model, *more).stdout)["results"]
    assert row["requests"] == 12 and row["tokens_per_second"] > 0
    assert row["prefill_tokens"] == 12 * 8


def test_table(pyllmlite, model):
    out = sim(pyllmlite, model, "--gpu", "h100", "--shared-prefix", "32").stdout
    assert "worst gap ms" in out and "simulated" in out and "static" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arrivals", "poisson"], ["--rate", "--load"]),
        (["--rate", "3"], ["poisson"]),
        (["--arrivals", "poisson", "--rate", "1", "--load", "1"], ["either"]),
        (["--only"], ["--scheduler"]),
        (["-s", "fairest"], ["fairest", "known:"]),
        (["--gpu", "l4", "--extra", "chunk=3"], ["chunk"]),
        (["--gpu", "l4", "--real"], ["--gpu"]),
        (["--gpu", "l4", "--long-prompt", "100000"], ["100001", "max_model_len"]),
        (["--replicas", "65"], ["65", "64"]),
        (["--output-lengths", "many"], ["fixed:N"]),
    ],
)
def test_refusals_are_one_line(pyllmlite, model, arguments, words):
    done = pyllmlite("bench", "serve-sim", "-m", model, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in words), line
