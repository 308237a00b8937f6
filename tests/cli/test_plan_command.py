"""``pyllmlite plan``: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest


def test_plan_of_a_gpu(pyllmlite, model):
    asked = ("plan", model, "--gpu", "h100", "--context", "64", "--price-per-hour", "2", "--json")
    told = json.loads(pyllmlite(*asked, check=0).stdout)
    assert told["format"] == "stored"
    assert {"stored", "bf16", "int8", "int4"} <= set(told["weights"])
    assert told["kv"]["bytes_per_token_mha"] >= told["kv"]["bytes_per_token"]
    assert told["max_sequences"] > 0
    costs = [row["cost_per_million"] for row in told["batches"]]
    assert costs == sorted(costs, reverse=True)


def test_plan_of_a_config_without_weights(pyllmlite, model, tmp_path):
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_text((Path(model) / "config.json").read_text())
    out = pyllmlite("plan", str(folder), "--gpu", "l4", "--format", "int4", check=0).stdout
    assert "int4 *" in out and "B*" in out and "NVIDIA L4" in out


def test_of_a_model_on_the_hub_only_the_config_is_fetched(model, monkeypatch):
    from pyllmlite.cli.plan import open_headers
    from pyllmlite.model import hub

    asked = []

    def fetch(name, file, revision):
        asked.append((name, file))
        return Path(model) / "config.json"

    monkeypatch.setattr(hub, "_hub_file", fetch)
    spec, source = open_headers("org/name")
    assert asked == [("org/name", "config.json")] and source is None
    assert spec.num_layers == open_headers(model)[0].num_layers
    for other in (None, "smollm2", model, "./config.json", "org/name/model.gguf"):
        assert other is None or hub.hub_config(other) is None


def test_plan_measures_this_machine(pyllmlite, model):
    asked = ("plan", model, "--context", "24", "-b", "1", "-b", "2", "-b", "3", "--threads", "1")
    told = json.loads(pyllmlite(*asked, "--measure", "--json", check=0).stdout)
    assert [row["batch"] for row in told["measured"]["steps"]] == [1, 2, 3]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in told["measured"]["steps"])
    assert told["measured"]["weight_bytes"] == told["weights"]["stored"]["bytes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h10"], ["h100", "known:"]),
        (["--gpu", "h100", "--measure"], ["--measure", "this machine"]),
        (["--format", "int5"], ["int4", "int5"]),
        (["--kv-dtype", "fp8"], ["int8", "fp8"]),
        (["--context", "100000"], ["100000", "positions"]),
        (["--plot", "a.txt"], [".png"]),
    ],
)
def test_plan_refuses_in_one_line(pyllmlite, model, arguments, words):
    done = pyllmlite("plan", model, *arguments)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert all(word in line for word in words)
