"""Every command: what it prints, how it fails, and that --json is JSON and nothing else."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pyllmlite.cli.main import app
from pyllmlite.cli.options import ENGINE, SAMPLING, parse_extra
from pyllmlite.core.config import EngineConfig
from pyllmlite.core.sampling import SamplingParams

COMMANDS = ["run", "chat", "pull", "info", "plugins", "explain", "bench", "new-plugin", "quantize",
            "eval", "plan", "serve", "distill"]  # fmt: skip


def one_error_line(done, *words, code=1):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pyllmlite: error: ")
    for word in words:
        assert word in lines[0]


# -- the options ---------------------------------------------------------------------------
def test_help_names_every_command():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.output


@pytest.mark.parametrize("command", ["run", "chat", "explain", "bench", "serve"])
def test_same_engine_options_everywhere(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    for name in [*ENGINE, "extra"]:
        assert "--" + name.replace("_", "-") in result.output


def test_tables_are_the_dataclasses():
    config = {field.name for field in dataclasses.fields(EngineConfig)}
    assert set(ENGINE) <= config
    # The model has its own option, the seed is sampling's, --extra and tokens-only are apart.
    assert config - set(ENGINE) == {"model", "seed", "extra", "skip_tokenizer_init"}
    assert set(SAMPLING) <= {field.name for field in dataclasses.fields(SamplingParams)}


def test_extra():
    assert parse_extra(["a=1", "b=word", "c=[1, 2]", "d=x=y", "e="]) == {
        "a": 1,
        "b": "word",
        "c": [1, 2],
        "d": "x=y",
        "e": "",
    }
    assert parse_extra(None) == {}


@pytest.mark.parametrize(
    "arguments", [["run", "--max-tokens", "many"], ["nonsense"], ["run", "a", "--extra", "x"]]
)
def test_usage_is_code_2(pyllmlite, arguments):
    done = pyllmlite(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stdout == ""


# -- run -----------------------------------------------------------------------------------
def test_run_json(pyllmlite, model):
    done = pyllmlite("run", "Hi", "-m", model, "--max-tokens", "5", "--ignore-eos", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["token_ids"]) == 5
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["prompt_tokens"] > len("Hi")  # in chat form


def test_run_prints_the_same_streamed_or_not(pyllmlite, model):
    asked = ("run", "Hi", "-m", model, "--max-tokens", "12", "--seed", "3", "--temperature", "1")
    whole = pyllmlite(*asked, "--no-stream", check=0).stdout
    assert pyllmlite(*asked, "--stream", check=0).stdout == whole
    assert json.loads(pyllmlite(*asked, "--json", check=0).stdout)["text"] == whole[:-1]


def test_raw_is_not_chat(pyllmlite, model):
    done = pyllmlite("run", "Hi", "-m", model, "--max-tokens", "2", "--raw", "--json", check=0)
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == 2


def test_prompt_from_stdin(pyllmlite, model):
    asked = ("-m", model, "--max-tokens", "3", "--json")
    by_stdin = json.loads(pyllmlite("run", *asked, stdin="Hi\n", check=0).stdout)
    by_word = json.loads(pyllmlite("run", "Hi", *asked, check=0).stdout)
    assert by_stdin["token_ids"] == by_word["token_ids"]


def test_a_base_model_goes_on(pyllmlite, base_model):
    done = pyllmlite("run", "Hi", "-m", base_model, "--max-tokens", "2", "--json", check=0)
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize("option", ["attention", "cache", "quantizer", "scheduler", "decoder"])
def test_unknown_strategy(pyllmlite, model, option):
    one_error_line(pyllmlite("run", "Hi", "-m", model, f"--{option}", "nosuch"), "nosuch", "known:")


def test_near_name(pyllmlite, model):
    done = pyllmlite("run", "Hi", "-m", model, "--scheduler", "continous")
    one_error_line(done, "did you mean 'continuous'?")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--top-p", "2"], "top_p"),
        (["--temperature", "-1"], "temperature"),
        (["--max-tokens", "0"], "max_tokens"),
        (["--dtype", "f8"], "dtype"),
        (["--kv-cache-memory", "lots"], "memory"),
        (["--max-model-len", "4"], "4"),
        (["--device", "cuda"], "cuda"),
    ],
)
def test_bad_option(pyllmlite, model, options, word):
    one_error_line(pyllmlite("run", "Hello there", "-m", model, *options), word)


def test_bad_models(pyllmlite, tmp_path, model):
    one_error_line(pyllmlite("run", "Hi", "-m", str(tmp_path / "nowhere")), "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    one_error_line(pyllmlite("run", "Hi", "-m", str(empty)), "empty")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(b"GGUF\x03\x00")
    one_error_line(pyllmlite("run", "Hi", "-m", str(cut)), "cut.gguf")


def test_empty_prompt(pyllmlite, model):
    one_error_line(pyllmlite("run", "", "-m", model), "empty")
    one_error_line(pyllmlite("run", "-m", model, stdin=""), "empty")


def test_traceback_only_when_asked_for(pyllmlite, tmp_path):
    done = pyllmlite("run", "Hi", "-m", str(tmp_path / "no"), env={"PYLLMLITE_DEBUG": "1"})
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_broken_pipe_is_quiet(model, tmp_path):
    command = f"{sys.executable} -m pyllmlite.cli.main"
    done = subprocess.run(
        ["bash", "-c", f"{command} plugins | true; {command} explain {model} --all | head -c 10"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stderr == ""


# -- chat ----------------------------------------------------------------------------------
def test_chat(pyllmlite, model):
    done = pyllmlite(
        "chat",
        *("-m", model, "--max-tokens", "4", "--ignore-eos"),
        stdin="Hello\n\n/help\n/nonsense\n/reset\nAgain\n/exit\nnever\n",
        check=0,
    )
    assert "/nonsense is no command" in done.stdout
    assert done.stdout.count("/reset") == 2  # the help, twice
    assert "never" not in done.stdout
    assert done.stderr == ""


def test_chat_survives_a_line_that_is_too_long(pyllmlite, model):
    done = pyllmlite(
        "chat", "-m", model, "--max-tokens", "4", stdin="x" * 2000 + "\nshort\n", check=0
    )
    assert done.stderr.count("error:") == 1 and done.stdout.strip()


def test_chat_needs_a_template(pyllmlite, base_model):
    one_error_line(pyllmlite("chat", "-m", base_model, stdin="Hi\n"), "chat template")


# -- what is here --------------------------------------------------------------------------
def test_info_json(pyllmlite):
    facts = json.loads(pyllmlite("info", "--json", check=0).stdout)
    assert facts["instruction_set"] in facts["instruction_sets_available"]
    assert facts["cpus"] >= 1 and facts["memory_bytes"] > 0
    assert facts["default_model"] == "smollm2-135m"
    assert facts["default_model_path"] is None  # the cache folder is empty


def test_info_imports_no_torch(pyllmlite, tmp_path):
    code = (
        "import sys; from pyllmlite.cli import info; facts = info.gather(); "
        "assert facts['numpy']; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.stdout == "[]\n", done.stderr


def test_info_for_people(pyllmlite):
    out = pyllmlite("info", check=0).stdout
    for word in ("pyllmlite", "cpu", "cuda", "memory", "smollm2-135m"):
        assert re.search(rf"^{word}|{word}", out, re.M)


def test_plugins(pyllmlite):
    listed = json.loads(pyllmlite("plugins", "--json", check=0).stdout)
    names = {(row["contract"], row["name"]) for row in listed["plugins"]}
    assert names >= {
        ("attention", "flash"),
        ("attention", "reference"),
        ("cache", "paged"),
        ("cache", "contiguous"),
        ("quantizer", "none"),
        ("quantizer", "rtn"),
        ("scheduler", "continuous"),
        ("scheduler", "static"),
        ("decoder", "sample"),
    }
    assert all(row["distribution"] and row["version"] for row in listed["plugins"])
    table = pyllmlite("plugins", check=0).stdout
    assert "continuous" in table and table.startswith("contract")


def test_disabled_plugins(pyllmlite):
    off = {"PYLLMLITE_DISABLE_PLUGINS": "scheduler"}
    listed = json.loads(pyllmlite("plugins", "--json", env=off, check=0).stdout)
    names = {row["name"] for row in listed["plugins"]}  # other distributions bring schedulers too
    assert "continuous" not in names and "paged" in names
    assert len(listed["disabled"]) == 1


def test_explain(pyllmlite, model):
    told = json.loads(pyllmlite("explain", model, "--json", "--batch", "4", check=0).stdout)
    chosen = {entry["hook"]: entry["name"] for entry in told["selections"]}
    assert chosen["scheduler"] == "continuous" and chosen["attention"] == "flash"
    names = [op["op"] for op in told["program"]]
    assert "layers.1.qkv" in names and names[-1] == "sample"
    assert told["bytes"] == pytest.approx(sum(op["bytes"] for op in told["program"]))
    text = pyllmlite("explain", model, check=0).stdout
    assert "layers.0.qkv" in text and "layers.1.qkv" not in text
    assert "layers.1.qkv" in pyllmlite("explain", model, "--all", check=0).stdout


def test_bench(pyllmlite, model):
    asked = ("bench", "-m", model, "-b", "1", "-b", "3", "--prompt-tokens", "9")
    done = pyllmlite(*asked, "--new-tokens", "4", "--profile", "--json", check=0)
    told = json.loads(done.stdout)
    assert [row["batch"] for row in told["results"]] == [1, 3]
    assert all(row["decode_tokens_per_second"] > 0 for row in told["results"])
    ops = {op["op"]: op for op in told["profile"][1]["ops"]}
    assert ops["layers.*.qkv"]["calls"] == 2 * ops["sample"]["calls"]
    assert sum(op["share"] for op in ops.values()) == pytest.approx(1)
    assert "decode tok/s" in pyllmlite(*asked, "--new-tokens", "2", check=0).stdout


def test_version_and_directories(pyllmlite):
    assert re.fullmatch(r"pyllmlite \d+\.\S+\n", pyllmlite("--version", check=0).stdout)
    include = pyllmlite("--include-dir", check=0).stdout.strip()
    assert os.path.isfile(os.path.join(include, "pyllmlite", "op.h"))
    cmake = pyllmlite("--cmake-dir", check=0).stdout.strip()
    assert os.path.isfile(os.path.join(cmake, "pyllmliteConfig.cmake"))


def test_pull_of_a_directory(pyllmlite, model):
    assert pyllmlite("pull", model, check=0).stdout.strip() == model
    assert json.loads(pyllmlite("pull", model, "--json", check=0).stdout)["path"] == model


def test_ctrl_c_is_quiet(model, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "pyllmlite", "run", "Hi", "-m", model, "--stream", "--ignore-eos"]
        + ["--max-tokens", "400"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors == b""
    assert process.returncode in (0, 130)  # 0: it was done before the signal came


def test_closed_standard_output():
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m pyllmlite.cli.main plugins >&-', sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr == ""
