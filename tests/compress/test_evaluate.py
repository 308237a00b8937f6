"""Loss, size and warnings; each figure by a formula of its own."""

import json

import numpy as np
import pytest

from pyllmlite.cli.plot_file import check_plot
from pyllmlite.compress.compare import Distributions, Score
from pyllmlite.compress.evaluate import Choice, evaluate, provenance
from pyllmlite.compress.plot import draw
from pyllmlite.compress.quantize import quantize_model
from pyllmlite.compress.settings import Settings
from pyllmlite.compress.texts import Text, read_text, windows_of
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.model.source import open_model


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_scores_by_formula():
    rng = np.random.default_rng(0)
    one = (4 * rng.standard_normal((7, 50))).astype(np.float32)
    two = (one + rng.standard_normal(one.shape)).astype(np.float32)
    following = np.array([3, 1, 4, 1, 5, 9, -1])
    p, q = log_softmax(one), log_softmax(two)
    kl = (np.exp(p) * (p - q)).sum(-1)
    score = Score()
    first = Distributions.of(one)
    for part in (slice(0, 3), slice(3, 7)):
        reference = Distributions(first.shifted[part], first.log_sum[part], first.best[part])
        found = Distributions.of(two[part])
        score.add(reference, reference.probabilities(), found, following[part])
    assert score.mean_kl == pytest.approx(kl.mean(), rel=1e-5)
    assert score.kl_largest == pytest.approx(kl.max(), rel=1e-5)
    assert score.kl_error == pytest.approx(kl.std() / np.sqrt(7), rel=1e-4)
    assert score.agreement == (one.argmax(-1) == two.argmax(-1)).mean()
    nll = -q[np.arange(6), following[:6]].mean()
    assert score.perplexity == pytest.approx(np.exp(nll), rel=1e-5)


def test_logits_that_are_no_numbers():
    one = Distributions.of(np.zeros((1, 4), np.float32))
    bad = Distributions.of(np.array([[0, np.nan, 0, 0]], np.float32))
    with pytest.raises(ModelError, match="not finite"):
        Score().add(one, one.probabilities(), bad, np.array([1]))


def test_the_reference_loses_nothing_and_fewer_bits_lose_more(model):
    choices = [
        Choice.parse(f"{model}?{options}")
        for options in ("dtype=f32", "quantizer=rtn&bits=8", "quantizer=rtn&bits=4&group_size=32")
    ]
    report = evaluate(choices, read_text(None), windows=2, length=70, threads=1, speed=False)
    exact, eight, four = report.rows
    assert exact.kl < 1e-9 and exact.top1_agreement == 1
    assert exact.perplexity == pytest.approx(report.reference.perplexity, rel=1e-6)
    assert exact.kl < eight.kl < four.kl
    assert [row.bits_per_weight for row in report.rows] == pytest.approx([32, 8.23, 5], abs=0.05)
    assert four.label == "tiny rtn bits=4 group_size=32"


def test_weights_only_is_what_the_weights_cost(model):
    choice = [Choice.parse(f"{model}?quantizer=rtn&bits=4")]
    text = read_text(None)
    options = {"windows": 1, "length": 40, "speed": False, "threads": 1}
    floats = evaluate(choice, text, weights_only=True, **options)
    default = evaluate(choice, text, **options)
    assert floats.weights_only and floats.rows[0].kl != default.rows[0].kl


def test_a_written_directory_knows_what_it_was_made_from(model, tmp_path):
    out = quantize_model(
        str(model), tmp_path / "out", Settings("rtn", bits=8, layout="gptq"), eval_windows=1,
        eval_length=50, threads=1,
    )  # fmt: skip
    facts = provenance(open_model(out.path))
    assert facts == json.loads(json.dumps(out.facts))
    report = evaluate([Choice(str(out.path))], read_text(None), windows=1, length=50, speed=False,
                      weights_only=True, threads=1)  # fmt: skip
    assert report.reference.label == "tiny"
    assert report.rows[0].kl == pytest.approx(facts["measured"]["kl"], rel=1e-6)
    assert report.rows[0].kl > 0 and facts["base_path"]
    assert report.rows[0].bits_per_weight == pytest.approx(facts["bits_per_weight"], abs=1e-3)
    card = (out.path / "README.md").read_text()
    for words in ("rtn", "gptq", "KL divergence", "`tiny`", "weights alone"):
        assert words in card
    assert str(tmp_path) not in card + json.dumps(facts)


def test_text_that_was_calibrated_on_is_said(model, tmp_path):
    out = quantize_model(str(model), tmp_path / "out", Settings("rtn", bits=8), eval_windows=0).path
    text = Text("prose", read_text(None).content)
    facts = provenance(open_model(out))
    facts["calibration"] = {"text": "x.txt", "sha256": text.sha256}
    (out / "quantize.json").write_text(json.dumps(facts))
    options = {"windows": 1, "length": 20, "speed": False, "threads": 1}
    (row,) = evaluate([Choice(str(out))], text, **options).rows
    assert "calibrated on prose" in row.warning
    (row,) = evaluate([Choice(str(out))], Text("other", text.content + "."), **options).rows
    assert row.warning == ""


def test_speed_is_measured(model):
    report = evaluate([Choice(str(model))], read_text(None), windows=1, length=20, threads=1)
    assert report.rows[0].prefill_tokens_per_second > 0
    assert report.rows[0].decode_tokens_per_second > 0


def test_models_with_other_vocabularies(model, tmp_path):
    from tiny_models import TINY

    other = TINY["llama"](tmp_path / "other")
    with pytest.raises(ModelError, match="vocabulary of 331"):
        evaluate([Choice(str(other))], read_text(None), Choice(str(model)), 1, 20, speed=False)


def test_texts(tmp_path, model):
    for name, data, words in (
        ("empty.txt", b" \n", "is empty"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("absent.txt", None, "cannot be read"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ConfigError, match=words):
            read_text(tmp_path / name)
    tokenizer = open_model(model).tokenizer()
    (tmp_path / "short.txt").write_text("a few words")
    text = read_text(tmp_path / "short.txt")
    with pytest.raises(ConfigError, match="too few for 2 windows of 10"):
        windows_of(text, tokenizer, 2, 10)
    assert windows_of(text, tokenizer, 2, 5) == [
        tokenizer.encode(part) for part in ("a few", " word")
    ]
    with pytest.raises(ConfigError, match="2 tokens at least"):
        windows_of(text, tokenizer, 1, 1)


def test_options_of_a_model():
    choice = Choice.parse("dir?quantizer=nf4&extra.kind=fp4&bits=4")
    assert choice == Choice("dir", {"quantizer": "nf4", "extra": {"kind": "fp4"}, "bits": 4})
    assert choice.label == "dir nf4 kind=fp4 bits=4"
    assert Choice.parse("").model is None
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        Choice.parse("dir?rtn")


def test_plot(model, tmp_path):
    pytest.importorskip("matplotlib")
    report = evaluate([Choice(str(model))], read_text(None), windows=1, length=20, speed=False)
    draw(report, tmp_path / "loss.svg")
    assert "tiny" in (tmp_path / "loss.svg").read_text() or (tmp_path / "loss.svg").stat().st_size
    for name, words in (("loss.gif", ".png"), ("no/loss.png", "no directory")):
        with pytest.raises(ConfigError, match=words):
            check_plot(tmp_path / name)
