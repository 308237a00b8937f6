"""``pyllmlite qat`` and ``share-kv`` as commands."""

import json

from test_commands import one_error_line


def test_qat(pyllmlite, model, tmp_path):
    (tmp_path / "text.txt").write_text("A model learns from what it reads. " * 60)
    done = pyllmlite(
        "qat", model, "-o", "out", "--start", "rtn", "--group-size", "32", "--text", "text.txt",
        "--num-sequences", "4", "--seq-len", "32", "--steps", "2", "--batch-size", "2",
        "--eval-windows", "1", "--eval-length", "40", "--json", check=0,
    )  # fmt: skip
    facts = json.loads(done.stdout)
    assert facts["settings"]["method"] == "qat" and facts["training"]["tokens"] == 128
    assert facts["measured"]["kl"] > 0 and facts["calibration"]["sha256"]
    assert "step 2 of 2" in done.stderr and "text to train on" in done.stderr
    ran = pyllmlite("run", "Hi", "--raw", "-m", "out", "--max-tokens", "4", check=0)
    assert ran.stdout.strip()


def test_share_kv(pyllmlite, model, tmp_path):
    (tmp_path / "text.txt").write_text("A model learns from what it reads. " * 60)
    done = pyllmlite(
        "share-kv", model, "--kv-heads", "1", "-o", "out", "--tokens", "128", "--text", "text.txt",
        "--seq-len", "32", "--batch-size", "2", "--eval-windows", "1", "--eval-length", "40",
        check=0,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[0].endswith("out: 4 query heads, 1 KV heads (were 2)")
    assert lines[1].split("  ")[-1].strip() == "KL"
    assert " 256 " in lines[2] and " 128 " in lines[3]  # 2 bytes, K and V, 2 layers, heads of 16
    assert lines[-1].startswith("training on 128 tokens won back")
    ran = pyllmlite("run", "Hi", "--raw", "-m", "out", "--max-tokens", "4", check=0)
    assert ran.stdout.strip()


def test_they_refuse_in_one_line(pyllmlite, model, tmp_path):
    one_error_line(pyllmlite("qat", model), "--out")
    one_error_line(pyllmlite("qat", model, "-o", "x", "--bits", "7"), "bits must be one of")
    one_error_line(pyllmlite("share-kv", model, "-o", "x"), "--kv-heads")
    few = pyllmlite("share-kv", model, "--kv-heads", "3", "-o", "x", "--tokens", "0")
    one_error_line(few, "2 KV heads for 4 query heads already")
    one_error_line(pyllmlite("share-kv", model, "--kv-heads", "1", "-o", "x"), "how long to train")
    assert not (tmp_path / "x").exists()
