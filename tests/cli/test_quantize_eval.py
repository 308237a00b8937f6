"""``pyllmlite quantize`` and ``eval`` as commands."""

import json
from pathlib import Path

import pytest
from test_commands import one_error_line

from pyllmlite.cli.quantize import Estimate, clock


@pytest.fixture
def written(pyllmlite, model, tmp_path):
    done = pyllmlite(
        "quantize", model, "--out", str(tmp_path / "out"), "--group-size", "32",
        "--eval-windows", "1", "--eval-length", "40", "--json", check=0,
    )  # fmt: skip
    return done, tmp_path / "out"


def test_quantize(written, pyllmlite):
    done, out = written
    facts = json.loads(done.stdout)
    assert Path(facts["path"]) == out and facts["settings"]["method"] == "rtn"
    assert facts["measured"]["kl"] > 0 and facts["bytes"] > 0
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["layer 1 of 2", "layer 2 of 2"]
    assert lines[0].endswith("left")
    ran = pyllmlite("run", "Hi", "--raw", "-m", str(out), "--max-tokens", "4", check=0)
    assert ran.stdout.strip()


def test_quantize_for_people(pyllmlite, model, tmp_path):
    done = pyllmlite("quantize", model, "-m", "bf16", "-o", "out", "--eval-windows", "1",
                     "--eval-length", "40", check=0)  # fmt: skip
    assert "16.00 bits per weight" in done.stdout and "KL divergence" in done.stdout


def test_quantize_refuses_in_one_line(pyllmlite, model, tmp_path, written):
    one_error_line(pyllmlite("quantize", model), "--out")
    one_error_line(pyllmlite("quantize", model, "-o", "out"), "--force")
    one_error_line(pyllmlite("quantize", model, "-o", "x", "--group-size", "999"), "fits no layer")
    one_error_line(pyllmlite("quantize", model, "-o", "x", "-m", "nothing"), "nothing")
    (tmp_path / "plan.json").write_text("[1]")
    one_error_line(pyllmlite("quantize", model, "-o", "x", "--plan", "plan.json"), "a plan is")
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_eval(written, pyllmlite, model, tmp_path):
    _, out = written
    done = pyllmlite(
        "eval", model, str(out), "-N", "1", "-L", "40", "--no-speed", "--json",
        "--plot", "loss.png", check=0,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert [row["label"] for row in report["rows"]] == [Path(model).name, "out"]
    assert report["rows"][1]["kl"] > report["rows"][0]["kl"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_eval_compares_quantizers(pyllmlite, model):
    done = pyllmlite(
        "eval", model, "--quantizer", "rtn?bits=8,nf4,int8", "-N", "1", "-L", "40", check=0
    )
    lines = done.stdout.splitlines()
    assert "decode tok/s" in lines[0] and len(lines) == 6
    assert "rtn bits=8" in lines[1] and "nf4" in lines[2] and "int8" in lines[3]
    assert "in f32" in lines[5]


def test_eval_says_what_flatters(written, pyllmlite):
    _, out = written
    facts = json.loads((out / "quantize.json").read_text())
    facts["calibration"] = {"text": "pydoc_data.topics"}
    (out / "quantize.json").write_text(json.dumps(facts))
    done = pyllmlite("eval", str(out), "-N", "1", "-L", "40", "--no-speed", check=0)
    assert "(!)" in done.stdout and "warning" in done.stderr and "calibrated on" in done.stderr


def test_eval_refuses_in_one_line(pyllmlite, model):
    one_error_line(pyllmlite("eval", model, "--text", "no.txt"), "no.txt")
    one_error_line(pyllmlite("eval", model, "--quantizer", ","), "--quantizer")
    one_error_line(pyllmlite("eval", model, "--plot", "x.gif"), ".png")
    one_error_line(pyllmlite("eval", f"{model}?bits"), "NAME=VALUE")


def test_time_left():
    estimate = Estimate()
    assert estimate.left(5) == "-:--"
    estimate.add(10)
    estimate.add(20)
    assert estimate.left(5) == "1:15" and estimate.left(0) == "0:00"
    assert clock(3725) == "1:02:05"
