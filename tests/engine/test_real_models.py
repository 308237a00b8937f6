"""The engine on the native runtime: every request yields, bit for bit, what it yields alone."""

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyllmlite._native")

from engine_fakes import drain

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.engine import Engine
from pyllmlite.engine.llm import LLM
from pyllmlite.engine.overhead import write_tiny_model
from pyllmlite.model.build import build
from pyllmlite.model.builder import kv_element_bytes

VOCAB = 1024


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory)
    return directory


def made(directory, **options):
    settings = {
        "dtype": "f32", "max_model_len": 160, "max_num_seqs": 8, "max_num_batched_tokens": 24,
        "skip_tokenizer_init": True, "threads": 1, **options,
    }  # fmt: skip
    return build(str(directory), EngineConfig(model=str(directory), **settings))


def mixed_requests(vocab, count=32):
    """Short and long prompts, shared prefixes, greedy and random, n > 1, scored prompts."""
    draw = random.Random(3)
    shared = [draw.randrange(vocab) for _ in range(50)]
    cases = []
    for i in range(count):
        prompt = [draw.randrange(vocab) for _ in range(draw.choice([1, 3, 16, 17, 40, 90]))]
        if i % 3 == 0:
            prompt = shared + prompt[:30]
        cases.append(
            (
                prompt,
                SamplingParams(
                    temperature=0 if i % 4 == 0 else 0.9,
                    top_p=0.9 if i % 5 == 1 else 1.0,
                    top_k=20 if i % 5 == 2 else 0,
                    repetition_penalty=1.2 if i % 7 == 3 else 1.0,
                    seed=i,
                    max_tokens=draw.choice([1, 8, 30]),
                    n=3 if i % 8 == 5 else 1,
                    ignore_eos=True,
                    logprobs=2 if i % 3 == 1 else None,
                    prompt_logprobs=1 if i % 10 == 4 else None,
                    detokenize=False,
                ),
            )
        )
    return cases


def kv_bytes(built_spec, tokens, bytes_per_element):
    return int(built_spec.kv_bytes_per_token(bytes_per_element) * tokens)


def assert_neighbours_do_not_matter(directory, cache_tokens=192, **options):
    roomy = made(directory, **options)
    memory = kv_bytes(
        roomy.spec, cache_tokens, kv_element_bytes(roomy.cache.kv_dtype, roomy.spec.head_dim)
    )
    cases = mixed_requests(roomy.spec.vocab_size)
    small = made(directory, kv_cache_memory=memory, **options)
    engine = Engine(small)
    states = [engine.prepare(str(i), *case) for i, case in enumerate(cases)]
    for state in states:
        engine.submit(state)
    together = drain(engine)
    preemptions = sum(s.preemptions for state in states for s in state.request.sequences)
    assert preemptions > 0 and small.cache.stats()["hit_tokens"] > 0
    assert small.cache.num_free_blocks == small.cache.stats()["num_blocks"]
    for i, case in enumerate(cases):
        roomy.cache.reset_prefix_cache()
        alone = Engine(roomy)
        alone.add(str(i), *case)
        expected = drain(alone, check=False)[str(i)]
        assert together[str(i)].error is None
        assert together[str(i)].outputs == expected.outputs, i
        assert together[str(i)].prompt_logprobs == expected.prompt_logprobs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "bf16", "threads": 2},
        {"quantizer": "rtn", "bits": 4, "group_size": 32},
    ],
    ids=["f32", "bf16", "int4"],
)
def test_a_request_does_not_feel_its_neighbours(tiny, options):
    assert_neighbours_do_not_matter(tiny, **options)


@pytest.mark.parametrize("cache", ["paged", "paged-int8"])
@pytest.mark.parametrize("name", ["gemma2", "mistral", "gpt2", "bloom"])
def test_nor_with_windows_and_other_positions(tmp_path, name, cache):
    pytest.importorskip("transformers")
    from tiny_models import TINY

    TINY[name](tmp_path / name)
    assert_neighbours_do_not_matter(tmp_path / name, cache_tokens=256, cache=cache)


def test_cache_and_scheduler_change_nothing(tiny):
    cases = mixed_requests(VOCAB, 12)
    want = None
    for options in (
        {},
        {"cache": "contiguous"},
        {"scheduler": "static"},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 64},
        {"max_num_seqs": 1, "threads": 2},
    ):
        engine = Engine(made(tiny, **options))
        for i, case in enumerate(cases):
            engine.add(str(i), *case)
        done = drain(engine)
        outputs = [done[str(i)].outputs for i in range(len(cases))]
        want = want or outputs
        assert outputs == want, options


def test_a_step_that_fails_in_native_code_or_python_hurts_nobody_else(tiny):
    built = made(tiny, max_num_seqs=2)
    engine = Engine(built)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    prompts = [[i + 1] * 20 for i in range(4)]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params)
    engine.step()
    built.batch.token_table[engine.pool.running[0].row, :] = -5  # no token: set_step refuses it
    done = drain(engine)
    assert "token id -5" in done["0"].error
    for i in (2, 3):
        fresh = Engine(made(tiny))
        fresh.add("x", prompts[i], params)
        assert done[str(i)].outputs == drain(fresh)["x"].outputs
    assert built.cache.num_free_blocks == built.cache.stats()["num_blocks"]


def test_nan_weights_end_a_request_and_leave_the_cache_usable(tmp_path, monkeypatch):
    """A token whose embedding is NaN: its request fails, its blocks are used again."""
    write_tiny_model(tmp_path)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    offsets = json.loads(data[8 : 8 + size])["model.embed_tokens.weight"]["data_offsets"]
    at = 8 + size + offsets[0] + 7 * 64 * 4
    data[at : at + 64 * 4] = np.full(64, np.nan, "<f4").tobytes()
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="embed holds nan"):
        made(tmp_path)
    # Past that check, as if the model had overflowed on its own:
    monkeypatch.setattr("pyllmlite_plugins.quantizer.none.require_finite", lambda *_: None)
    built = made(tmp_path, kv_cache_memory=kv_bytes(made(tmp_path).spec, 160, 4))
    llm = LLM.from_built(built)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logit_bias={7: -100})
    good = [[i + 10] * 30 for i in range(3)]
    before = llm.generate(good, params, use_tqdm=False)
    outputs = llm.generate([good[0], [1, 2, 7, 3], good[1], good[2]], params, use_tqdm=False)
    assert outputs[1].outputs[0].finish_reason == "error" and "not finite" in outputs[1].error
    after = llm.generate(good, params, use_tqdm=False)
    for a, b, c in zip(before, [outputs[0], *outputs[2:]], after, strict=True):
        assert a.outputs == b.outputs == c.outputs


def test_random_operations(tiny):
    built = made(tiny, max_num_seqs=6, max_num_batched_tokens=20)
    built = made(
        tiny, max_num_seqs=6, max_num_batched_tokens=20, max_model_len=64,
        kv_cache_memory=kv_bytes(built.spec, 13 * 16, 4),
    )  # fmt: skip
    engine = Engine(built)
    draw = random.Random(0)
    prefix = [draw.randrange(VOCAB) for _ in range(40)]
    for number in range(2000):
        action, live = draw.random(), list(engine.requests)
        if action < 0.25 and len(live) < 14:
            prompt = prefix[: draw.randrange(1, 40)]
            prompt = prompt + [draw.randrange(VOCAB) for _ in range(draw.randrange(20))]
            params = SamplingParams(
                temperature=0.9,
                n=draw.choice([1, 1, 3]),
                max_tokens=draw.choice([1, 4, 20, None]),
                prompt_logprobs=draw.choice([None, None, 1]),
                ignore_eos=True,
            )
            engine.add(str(number), prompt, params)
        elif action < 0.3 and live:
            engine.abort(draw.choice(live))
        elif action < 0.34 and engine.pool.running:
            engine.pool.preempt(draw.choice(engine.pool.running))
        else:
            assert all(state.request.error is None for state in engine.step())
        if number % 10 == 0:
            engine.check_integrity()
    drain(engine)
    assert built.cache.num_free_blocks == built.cache.stats()["num_blocks"]


def test_the_path_of_a_checkpoint_is_enough(tiny):
    llm = LLM(
        Path(tiny),
        skip_tokenizer_init=True,
        max_model_len=64,
        threads=1,
        gpu_memory_utilization=0.9,
    )
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4), use_tqdm=False)
    assert output.finished and "scheduler" in llm.explain()
