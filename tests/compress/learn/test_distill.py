"""The whole command on tiny models, cut off, resumed, refused, in several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from text_model import write_text_model
from tiny_models import TINY

from pyllmlite.compress.learn import trainer as trainer_module
from pyllmlite.compress.learn.distill import distill
from pyllmlite.compress.learn.distill_settings import DistillSettings
from pyllmlite.compress.learn.export import card, name_of
from pyllmlite.compress.learn.filters import Filters
from pyllmlite.compress.learn.head import Head
from pyllmlite.compress.learn.records import read_records
from pyllmlite.compress.learn.teacher_text import TextSettings
from pyllmlite.core.errors import CapacityError, ConfigError, ModelError
from pyllmlite.model.hub import DEFAULT_MODEL
from pyllmlite.model.source import open_model

TEXT = TextSettings(num_sequences=24, max_tokens=10, chat=False, filters=Filters(min_tokens=2))
TRAIN = {"batch_size": 4, "seq_len": 32, "learning_rate": 3e-3, "steps": 6, "save_every": 2}


def settings(**more):
    words = {"text": TEXT, "train": TRAIN, "held_out": 4, "top_k": 8, "teacher_options": {
        "max_num_seqs": 4}}  # fmt: skip
    return DistillSettings(**{**words, **more})


def run(teacher, out, student="layers=1", **more):
    place = {k: more.pop(k) for k in ("force", "restart") if k in more}
    return distill(str(teacher), student, out, settings(**more), progress=False, **place)


def weights(path):
    from safetensors.torch import load_file

    return load_file(Path(path) / "model.safetensors")


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mode": "sequence"},
        {"mode": "on-policy", "share": 0.5, "direction": 0.5, "task_weight": 0.1},
        {"freeze_embeddings": True, "temperature": 2.0, "task_weight": 0.2, "dtype": "bf16"},
    ],
    ids=["logits", "sequence", "on-policy", "options"],
)
def test_a_student_comes_out(teacher, tmp_path, more):
    out = tmp_path / "student"
    result = run(teacher, out, **more)
    facts = json.loads((out / "distill.json").read_text())
    assert facts == json.loads(json.dumps(result.facts))
    log = [json.loads(line) for line in (out / "distill" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == list(range(7))
    assert log[0]["eval_kl"] == facts["before"]["kl"] != facts["after"]["kl"]
    assert facts["after"]["answers"] == 4 and facts["training"]["steps"] == 6
    card = (out / "README.md").read_text()
    assert f"{facts['after']['kl']:.4f}" in card and "as a draft" in card.lower()
    left = {p.name for p in (out / "distill").iterdir()}
    assert left == {"data.jsonl", "log.jsonl", "loss.png", "settings.json"}
    assert not out.with_name("student.partial").exists()
    if more.get("freeze_embeddings"):
        found = weights(out)["model.embed_tokens.weight"]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, weights(teacher)["model.embed_tokens.weight"].bfloat16())


def test_cut_off_anywhere_it_goes_on_to_the_same_student(teacher, tmp_path, monkeypatch):
    whole = run(teacher, tmp_path / "whole")
    out, partial = tmp_path / "cut", tmp_path / "cut.partial" / "distill"
    from pyllmlite.compress.learn import teacher_text

    answers, calls = teacher_text._answers, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("power failure")
        return answers(*arguments)

    monkeypatch.setattr(teacher_text, "_answers", failing)  # in the second wave of the text
    with pytest.raises(RuntimeError):
        run(teacher, out)
    data = (partial / "data.jsonl").read_bytes()
    assert data.count(b"\n") == 17
    (partial / "data.jsonl").write_bytes(data[:-30])  # and the disk lost the end
    monkeypatch.setattr(teacher_text, "_answers", answers)

    step = trainer_module.Trainer._step

    def failing_step(self, number, *rest):
        if number == 5:
            raise RuntimeError("power failure")
        return step(self, number, *rest)

    monkeypatch.setattr(trainer_module.Trainer, "_step", failing_step)  # behind checkpoint 4
    with pytest.raises(RuntimeError):
        run(teacher, out)
    monkeypatch.setattr(trainer_module.Trainer, "_step", step)
    assert not out.exists() and (partial / "train" / "checkpoint.pt").exists()
    resumed = run(teacher, out)
    assert same(tmp_path / "whole", out)
    for a, b in ((whole, resumed),):
        a, b = dict(a.facts), dict(b.facts)
        for facts in (a, b):
            facts["training"] = {k: v for k, v in facts["training"].items() if k != "seconds"}
        assert a == b
    texts = [(tmp_path / d / "distill" / "data.jsonl").read_bytes() for d in ("whole", "cut")]
    assert texts[0] == texts[1]


def test_other_settings_and_outputs_that_are_there(teacher, tmp_path, monkeypatch):
    out = tmp_path / "s"
    monkeypatch.setattr(
        trainer_module.Trainer, "run", lambda self: (_ for _ in ()).throw(RuntimeError("cut off"))
    )
    with pytest.raises(RuntimeError):
        run(teacher, out)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="unfinished run with other settings.*top_k: 8, now 9"):
        run(teacher, out, top_k=9)
    run(teacher, out, top_k=9, restart=True)
    with pytest.raises(ConfigError, match="exists; choose another --out, or --force"):
        run(teacher, out)
    run(teacher, out, force=True, mode="sequence")
    assert json.loads((out / "distill.json").read_text())["mode"] == "sequence"
    with pytest.raises(ConfigError, match="holds the model that is read"):
        run(teacher, teacher, force=True)


def test_what_another_command_left_is_not_published(teacher, tmp_path):
    """A quantization that was killed left shards and an index."""
    partial = tmp_path / "s.partial"
    (partial / ".pyllmlite").mkdir(parents=True)
    names = ("model-00001-of-00003.safetensors", ".pyllmlite/state.json")
    for name in names:
        (partial / name).write_text("{}")
    with pytest.raises(ConfigError, match="unfinished run of quantize"):
        run(teacher, tmp_path / "s")
    assert all((partial / name).read_text() == "{}" for name in names)
    run(teacher, tmp_path / "s", restart=True)
    left = {p.name for p in (tmp_path / "s").iterdir()}
    assert "distill.json" in left and not left & {".pyllmlite", names[0]}


def test_the_card_names_no_path_of_this_machine(teacher, tmp_path, monkeypatch):
    """Nor a hub id that is none."""
    monkeypatch.chdir(teacher.parent.parent)
    relative = f"{teacher.parent.name}/{teacher.name}"
    run(relative, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "of `teacher`, distilled" in text and "base_model" not in text
    assert str(teacher.parent) not in (tmp_path / "out" / "distill" / "data.jsonl").read_text()
    source = open_model(relative)
    assert name_of(None, source) == DEFAULT_MODEL and name_of("org/m", source) == "org/m"
    facts = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert "base_model: org/m" in card("n", {**facts, "teacher": "org/m"})


def test_text_alone_and_trained_on_later(teacher, tmp_path):
    result = run(teacher, tmp_path / "text", student=None, mode="text")
    assert result.facts["text"]["records"] == 24
    data = tmp_path / "text" / "data.jsonl"
    assert [p.name for p in (tmp_path / "text").iterdir()] == ["data.jsonl"]
    _, records = read_records(data)
    later = run(teacher, tmp_path / "later", data=str(data))
    at_once = run(teacher, tmp_path / "once")
    with pytest.raises(ConfigError, match="text holds .*data.jsonl, which is read"):
        run(teacher, tmp_path / "text", data=str(data), force=True)
    again = TextSettings(str(data), 4, chat=False)
    with pytest.raises(ConfigError, match="text holds .*data.jsonl, which is read"):
        run(teacher, tmp_path / "text", text=again, force=True)
    assert same(tmp_path / "later", tmp_path / "once")
    assert later.facts["text"] == at_once.facts["text"]
    assert len({tuple(r.token_ids) for r in records}) > 20  # each has a seed of its own
    for content, words in ((b"", "is empty"), (data.read_bytes()[:-9], "is cut off")):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            run(teacher, tmp_path / "bad", data=str(tmp_path / "bad.jsonl"))


def test_prompts_of_a_file_through_the_chat_template(teacher, tmp_path):
    (tmp_path / "p.txt").write_text("Hello\nWhat is this?\n")
    text = TextSettings(str(tmp_path / "p.txt"), 6, max_tokens=4, filters=Filters(min_tokens=1))
    run(teacher, tmp_path / "text", student=None, mode="text", text=text)
    header, records = read_records(tmp_path / "text" / "data.jsonl")
    assert [r.source for r in records] == [0, 1, 0, 1, 0, 1]
    assert records[1].prompt == (
        "<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(header["settings"]["prompts_sha256"]) == 64
    assert records[0].token_ids != records[2].token_ids
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ConfigError, match="is empty, there is no prompt"):
        run(teacher, tmp_path / "empty", student=None, mode="text", text=text)


def test_a_chat_model_writes_its_own_prompts(tmp_path):
    """Its answers rarely end, so here every token but the end is made unlikely."""
    from safetensors.torch import load_file, save_file

    teacher = write_text_model(tmp_path / "t")
    state = load_file(teacher / "model.safetensors")
    embed = state["model.embed_tokens.weight"]
    embed[258] = embed.abs().mean() * 3 * torch.sign(embed.mean(0))  # the end token
    save_file(state, teacher / "model.safetensors")
    text = TextSettings(num_sequences=30, max_tokens=4, filters=Filters(min_tokens=1))
    try:
        run(teacher, tmp_path / "text", student=None, mode="text", text=text)
        path = tmp_path / "text" / "data.jsonl"
    except ConfigError as error:
        assert "no answer was kept" in str(error)
        path = tmp_path / "text.partial" / "distill" / "data.jsonl"
    _, records = read_records(path)
    assert len(records) == 30
    for record in records:
        if record.dropped == "prompt":
            assert record.token_ids == []
        else:
            assert record.prompt.startswith("<|im_start|>user\n")
            assert record.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_bad_input_is_one_line(teacher, tmp_path, monkeypatch):
    def refused(error, words, *arguments, **more):
        with pytest.raises(error, match=words) as caught:
            run(teacher, tmp_path / "x", *arguments, **more)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "x").exists()

    missing = TextSettings(str(tmp_path / "none.txt"))
    refused(ConfigError, "none.txt: cannot be read", text=missing)
    assert not (tmp_path / "x.partial").exists()  # nothing was made, nothing stays
    other = str(TINY["llama"](tmp_path / "other"))
    refused(ConfigError, "has 331 tokens, the teacher 259", other)
    refused(ConfigError, "layers=5 cannot be cut out of a teacher with 2", "layers=5")
    refused(ConfigError, "say who learns", None)
    refused(ConfigError, "top_k is 1000, the vocabulary has 259", top_k=1000)
    long = {**TRAIN, "seq_len": 600}
    refused(ConfigError, "seq_len 600 is more than the models' 512", train=long)
    refused(ConfigError, "nothing is left to learn from", held_out=24)
    no_text = TextSettings(num_sequences=4, max_tokens=4, chat=False, filters=Filters(50))
    refused(ConfigError, "no answer was kept", text=no_text, restart=True)
    from pyllmlite.model import build

    monkeypatch.setattr(build, "available_memory", lambda: 10 << 20)
    refused(CapacityError, "training 0 M weights needs 0.3 GiB more", "layers=2")
    for words in ({"mode": "magic"}, {"direction": "up"}, {"share": 2}, {"top_k": 0},
                  {"temperature": 0}, {"train": {"speed": 1}}, {"train": {"steps": 0}},
                  {"mode": "text", "data": "x"}):  # fmt: skip
        with pytest.raises(ConfigError):
            settings(**words)


def test_students_that_cannot_be_are_refused_before_the_text(teacher, tmp_path, monkeypatch):
    gpt2 = TINY["gpt2"](tmp_path / "gpt2")
    with pytest.raises(ConfigError, match="cannot be cut out of gpt2"):
        run(gpt2, tmp_path / "x", "mlp=20", top_k=8, train={**TRAIN, "seq_len": 8})
    monkeypatch.setattr(Head, "__call__", lambda self, hidden: 2 * self.linear(hidden))
    for student in ("layers=1", str(teacher)):
        with pytest.raises(ModelError, match="computes more than its output matrix"):
            run(teacher, tmp_path / "x", student)
    assert not (tmp_path / "x.partial").exists()


def test_two_processes_are_two_micro_batches(teacher, tmp_path):
    """Two ranks with a micro-batch each take the steps of one process with two."""
    data = tmp_path / "text" / "data.jsonl"
    run(teacher, tmp_path / "text", student=None, mode="text")
    alone = {**TRAIN, "grad_accumulation": 2}
    run(teacher, tmp_path / "alone", train=alone, data=str(data))
    command = ["distill", "-t", str(teacher), "-s", "layers=1", "-o", str(tmp_path / "two"),
               "--data", str(data), "--held-out", "4", "--top-k", "8", "--batch-size", "4",
               "--seq-len", "32", "--lr", "3e-3", "--steps", "6", "--threads", "1"]  # fmt: skip
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = subprocess.run(
        [*launch, "-m", "pyllmlite.cli.main", *command],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("KL divergence") == 1  # one process speaks
    a, b = weights(tmp_path / "alone"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-3)
