"""The Program's logits against transformers' float32 eager ones, for every architecture."""

from __future__ import annotations

import numpy as np
import pytest
from model.program_logits import build_tiny, program_logits
from tiny_models import TINY, reference

from pyllmlite.core.errors import CapacityError
from pyllmlite.model import build

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module", params=list(TINY))
def tiny(request, tmp_path_factory):
    path = TINY[request.param](tmp_path_factory.mktemp(request.param))
    # longrope has two sets of factors; a model built for no more than the original length takes
    # the short ones, as transformers does for prompts of that length.
    options = {"max_model_len": 320} if "longrope" in request.param else {}
    return request.param, path, build_tiny(path, **options), reference(path)


@pytest.mark.parametrize("length", [1, 7, 64, 300])
def test_logits_equal_transformers(tiny, length):
    name, _, built, model = tiny
    tokens = np.random.default_rng(length).integers(3, built.spec.vocab_size, size=length).tolist()
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    ours = program_logits(built, tokens)
    assert np.abs(theirs).max() > 0.1  # the comparison means something
    assert np.abs(ours - theirs).max() < 2e-3, name


def test_longrope_beyond_the_original_length(tmp_path):
    path = TINY["phi3-longrope"](tmp_path)
    built, model = build_tiny(path), reference(path)
    tokens = np.random.default_rng(3).integers(3, built.spec.vocab_size, size=400).tolist()
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(program_logits(built, tokens) - theirs).max() < 2e-3


def test_chunks_change_no_bit(tiny):
    name, _, built, _ = tiny
    tokens = np.random.default_rng(5).integers(3, built.spec.vocab_size, size=90).tolist()
    whole = program_logits(built, tokens)
    for chunk in (1, 13):
        np.testing.assert_array_equal(program_logits(built, tokens, chunk), whole, err_msg=name)


def test_bf16_stays_near(tiny):
    name, path, built, _ = tiny
    tokens = np.random.default_rng(6).integers(3, built.spec.vocab_size, size=40).tolist()
    exact = program_logits(built, tokens)
    rounded = program_logits(
        build_tiny(path, dtype="bf16", max_model_len=built.max_model_len), tokens
    )
    scale = np.abs(exact).max()
    assert 0 < np.abs(rounded - exact).max() < 0.1 * scale, name


@pytest.mark.parametrize("bits,limit", [(8, 0.1), (4, 0.75)])
def test_rtn_stays_near(tiny, bits, limit):
    name, path, built, _ = tiny
    tokens = np.random.default_rng(6).integers(3, built.spec.vocab_size, size=40).tolist()
    exact = program_logits(built, tokens)
    light = program_logits(
        build_tiny(path, quantizer="rtn", bits=bits, max_model_len=built.max_model_len), tokens
    )
    error = np.linalg.norm(light - exact) / np.linalg.norm(exact)
    assert 0 < error < limit, name


def test_a_model_or_cache_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    path = TINY["llama"](tmp_path)
    with pytest.raises(CapacityError, match="kv_cache_memory does not fit"):
        build_tiny(path, kv_cache_memory="900TB")
    monkeypatch.setattr("pyllmlite.model.build.available_memory", lambda: 1000)
    with pytest.raises(CapacityError, match="the model does not fit"):
        build_tiny(path)


@pytest.mark.parametrize(
    ("asked", "stored", "quantized", "dtype"),
    [
        ("auto", "f32", False, "f32"),
        ("auto", "f32", True, "bf16"),
        ("auto", "q4_1", True, "bf16"),
        ("auto", "f16", False, "bf16"),
        ("f32", "bf16", True, "f32"),
    ],
)
def test_what_dtype_is_chosen(asked, stored, quantized, dtype):
    assert build._dtype(asked, stored, quantized) == dtype
