"""Attention sinks on the engine: what stays in the cache, how far it goes, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from text_model import write_text_model

from pyllmlite import LLM, SamplingParams
from pyllmlite.core.errors import ConfigError, PluginError
from pyllmlite.hooks.attention import AttentionNeeds
from pyllmlite.hooks.cache import CacheNeeds, KVGroup
from pyllmlite.hooks.registry import Registry
from pyllmlite_plugins.attention.flash import Flash
from pyllmlite_plugins.cache.paged import Paged

WINDOW, SINKS, BLOCK = 40, 4, 16
SINKING = {"sliding_window": WINDOW, "attention_sinks": SINKS}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """64 positions, of which a sequence needs far more."""
    path = write_text_model(tmp_path_factory.mktemp("sinks"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    return str(path)


def load(path, **options):
    return LLM(
        path, **({"threads": 1, "skip_tokenizer_init": True, "dtype": "f32"} | SINKING | options)
    )


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def scored(llm, ids):
    """Log-probability of every token of ``ids`` but the first."""
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    assert output.error is None
    llm.engine.check_integrity()
    return np.array([next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]])


def test_reference_and_flash_agree_far_beyond_the_models_positions(path):
    ids = prompt(300)
    options = {"max_model_len": 400, "max_num_seqs": 2}
    flash = scored(load(path, **options), ids)
    plain = scored(load(path, attention="reference", **options), ids)
    np.testing.assert_allclose(flash, plain, atol=1e-4)
    chunked = load(path, max_num_batched_tokens=7, block_size=32, **options)
    assert (scored(chunked, ids) == flash).all()
    # Within the window nothing is different from a model without one.
    whole = scored(load(path, sliding_window=None, attention_sinks=0, max_num_seqs=2), ids[:60])
    assert (whole[: WINDOW - 1] == flash[: WINDOW - 1]).all()
    assert (whole[WINDOW:] != flash[WINDOW:59]).mean() > 0.8


def test_the_cache_holds_sinks_and_window_and_no_more(path):
    llm = load(path, max_model_len=400, max_num_seqs=1, max_num_batched_tokens=16)
    engine, cache = llm.engine, llm.built.cache
    asked = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True, detokenize=False)
    engine.add("a", {"prompt_token_ids": prompt(50)}, asked)
    most = 0
    while engine.has_unfinished:
        engine.step()
        engine.check_integrity()
        most = max(most, cache.num_blocks - cache.num_free_blocks)
    # The sinks' block, those that the window touches, one to go back to, and a chunk.
    peak = 1 + -(-(WINDOW - 1) // BLOCK) + 2 + 1
    assert most <= peak
    per_block = cache.nbytes // cache.num_blocks
    tight = load(path, max_model_len=400, max_num_seqs=1, max_num_batched_tokens=16,
                 kv_cache_memory=peak * per_block)  # fmt: skip
    ids = prompt(390, 3)
    assert (scored(tight, ids) == scored(llm, ids)).all()


@pytest.mark.parametrize("kv", ["f32", "bf16", "int8"])
def test_requests_that_share_a_prefix_and_crowd_end_with_their_own_tokens(path, kv):
    prompts = [prompt(70) + prompt(5 + i, i) for i in range(9)]
    asked = SamplingParams(
        n=2, temperature=0.8, seed=3, max_tokens=60, ignore_eos=True, detokenize=False
    )
    options = {"max_model_len": 200, "kv_cache_dtype": kv}
    alone = load(path, max_num_seqs=2, enable_prefix_caching=False, **options)
    wanted = [alone.generate([p], asked, use_tqdm=False)[0] for p in prompts]
    small = load(path, max_num_seqs=8, max_num_batched_tokens=32, **options)
    few = 24 * small.built.cache.nbytes // small.built.cache.num_blocks
    for llm in (small, load(path, max_num_seqs=8, kv_cache_memory=few, **options)):
        for got, want in zip(llm.generate(prompts, asked, use_tqdm=False), wanted, strict=True):
            assert [c.token_ids for c in got.outputs] == [c.token_ids for c in want.outputs]
        llm.engine.check_integrity()
    assert llm.engine.pool.preemptions > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": None}, "give sliding_window too"),
        ({"sliding_window": 0}, "sliding_window must be"),
        ({"attention_sinks": -1}, "attention_sinks must be"),
        ({"sliding_window": 61, "max_model_len": 100}, "may be 64"),
        ({"attention_sinks": 0, "max_model_len": 100}, "with sliding_window and attention_sinks"),
        ({"attention_sinks": 257}, "at most 256 sinks"),
    ],
)
def test_what_cannot_work_is_refused(path, options, message):
    with pytest.raises((ConfigError, PluginError), match=message):
        load(path, **options)


def test_who_does_not_declare_sinks_is_refused():
    class OldAttention(Flash):
        name = "old-attention"
        reads_sinks = False

    class OldCache(Paged):
        name = "old-cache"
        keeps_sinks = False

    registry = Registry.load()
    reading = AttentionNeeds("cpu", "f32", 8, 2, 2, "paged-kt", "f32", 16, window=True, sinks=4)
    with pytest.raises(PluginError, match="does not read attention sinks"):
        registry.select("attention", OldAttention, reading)
    groups = (KVGroup((0,), 20, 4),)
    keeping = CacheNeeds("cpu", "f32", groups, 1, 1, 8, 128, 4, 64, 10**6)
    with pytest.raises(PluginError, match="does not keep attention sinks"):
        registry.select("cache", OldCache, keeping)
