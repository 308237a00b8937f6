"""What sharing, forks, windows and preemption are for, counted on the engine."""

from __future__ import annotations

import json
import random

import pytest
from text_model import write_text_model

from pyllmlite import LLM, SamplingParams

BLOCK = 16


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = write_text_model(tmp_path_factory.mktemp("plain"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return str(path)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """The same, with every layer seeing 24 tokens."""
    path = write_text_model(tmp_path_factory.mktemp("window"))
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config |= {"sliding_window": 24, "max_position_embeddings": 1024}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def load(path, **options):
    return LLM(path, **({"threads": 1, "skip_tokenizer_init": True} | options))


def run(llm, prompts, params):
    """Tokens of every completion, tokens computed in all, and the most blocks held at once."""
    engine, cache = llm.engine, llm.built.cache
    outputs, computed, most = {}, 0, 0
    for i, prompt in enumerate(prompts):
        engine.add(str(i), {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished:
        for state in engine.step():
            assert state.request.error is None
            sequences = sorted(state.request.sequences, key=lambda s: s.child)
            outputs[state.request.id] = [s.output_token_ids for s in sequences]
        computed += sum(engine._step.counts)
        most = max(most, cache.num_blocks - cache.num_free_blocks)
    cache.check_integrity()
    return [outputs[str(i)] for i in range(len(prompts))], computed, most


def params(count, **more):
    return SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False, **more)


def drawn(count, seed):
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


@pytest.mark.parametrize("cache", ["paged", "paged-int8"])
def test_a_common_prefix_is_computed_once(plain, cache):
    prefix = drawn(512, 0)
    prompts = [prefix + drawn(8, 1 + i) for i in range(32)]
    asked = params(2, temperature=0.0)
    options = {"max_model_len": 544, "max_num_seqs": 8, "cache": cache}
    together, computed, _ = run(load(plain, **options), prompts, asked)
    assert computed == 512 + 32 * 8 + 32
    apart, everything, _ = run(load(plain, enable_prefix_caching=False, **options), prompts, asked)
    assert everything == 32 * (512 + 8) + 32
    assert together == apart


@pytest.mark.parametrize("scheduler", ["continuous", "static", "dynamic"])
@pytest.mark.parametrize("prefixes", [True, False])
def test_a_tenth_of_the_cache_changes_no_token(plain, scheduler, prefixes):
    prompts = [drawn(10 + i % 23, i) for i in range(20)]
    asked = params(40, temperature=0.7, seed=5)
    alone = load(plain, max_model_len=96, max_num_seqs=1, enable_prefix_caching=False)
    wanted = [run(alone, [prompt], asked)[0][0] for prompt in prompts]
    options = {"max_model_len": 96, "max_num_seqs": 20, "scheduler": scheduler}
    options |= {"enable_prefix_caching": prefixes}
    ample = load(plain, **options)
    _, _, needed = run(ample, prompts, asked)
    per_block = ample.built.cache.nbytes // ample.built.cache.num_blocks
    few = max(6, needed // 10)  # 6: one sequence of 96 tokens
    llm = load(plain, kv_cache_memory=few * per_block, **options)
    assert llm.built.cache.num_blocks == few <= needed // 8
    got, _, most = run(llm, prompts, asked)
    assert got == wanted
    assert llm.engine.pool.preemptions > 0
    assert most <= few


def test_completions_hold_the_prompts_blocks_once(plain):
    prompt = drawn(5 * BLOCK + 3, 1)
    asked = params(12, n=8, temperature=1.0, seed=2)
    llm = load(plain, max_model_len=128, max_num_seqs=8, enable_prefix_caching=False)
    ((*completions,),), computed, most = run(llm, [prompt], asked)
    assert len(completions) == 8
    # Five blocks for all; each has its own copy of the half-filled one, which 12 tokens fit into.
    assert most == 5 + 8
    # The other seven run the prompt's last token again, which is what they begin from.
    assert computed == len(prompt) + 7 + 8 * 11
    _, _, apart = run(llm, [prompt] * 8, params(12, temperature=1.0, seed=2))
    assert apart == 8 * 6


def test_a_window_gives_back_what_fell_out_of_it(plain, windowed):
    prompt = drawn(60, 3)
    asked = params(300, temperature=0.0)
    options = {"max_model_len": 400, "max_num_seqs": 1, "max_num_batched_tokens": 16}
    ample = load(windowed, **options)
    wanted, _, most = run(ample, [prompt], asked)
    _, _, everything = run(load(plain, **options), [prompt], asked)
    assert everything == -(-359 // BLOCK)  # the last token is not run
    peak = 5  # ceil(23 / 16) blocks that are seen, two at its ends, and a chunk
    assert most <= peak
    per_block = ample.built.cache.nbytes // ample.built.cache.num_blocks
    tight = load(windowed, kv_cache_memory=peak * per_block, enable_prefix_caching=False, **options)
    assert run(tight, [prompt], asked)[0] == wanted


def test_chunks_bounded_while_others_decode_change_no_token(plain):
    prompts = [drawn(7 + 60 * (i % 3), i) for i in range(9)]
    asked = params(25, temperature=0.8, seed=1)
    options = {"max_model_len": 192, "max_num_seqs": 4}
    wanted, _, _ = run(load(plain, **options), prompts, asked)
    for extra in ({"max_prefill_tokens_per_step": 5}, {"max_decode_slowdown": 1.5}):
        assert run(load(plain, extra=extra, **options), prompts, asked)[0] == wanted
