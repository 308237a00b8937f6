"""Strategies change when tokens are computed and where they are kept, never which they are."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from text_model import write_text_model
from tiny_models import TINY

from pyllmlite import LLM, Registry, SamplingParams


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model without window, the same one seeing 24 tokens, and one with layers of both kinds."""
    plain = write_text_model(tmp_path_factory.mktemp("plain"))
    window = write_text_model(tmp_path_factory.mktemp("window"))
    config = json.loads((window / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config["sliding_window"] = 24
    (window / "config.json").write_text(json.dumps(config))
    both = TINY["gemma3"](tmp_path_factory.mktemp("both"))
    return {"plain": str(plain), "window": str(window), "both": str(both)}


def load(path, **options):
    options = {"max_model_len": 128, "threads": 1, "skip_tokenizer_init": True} | options
    return LLM(path, **options)


def requests():
    """Prompts with prefixes in common, greedy and random, long and short."""
    rng = random.Random(1)
    starts = [[rng.randrange(256) for _ in range(48)] for _ in range(2)]
    prompts, params = [], []
    for i in range(16):
        start = rng.choice(starts)[: rng.choice([0, 16, 40, 48])]
        prompts.append(start + [rng.randrange(256) for _ in range(rng.randint(1, 30))])
        if i % 5 == 4:
            prompts[-1] = list(prompts[-2])
        params.append(
            SamplingParams(
                max_tokens=rng.randint(1, 30),
                temperature=rng.choice([0.0, 0.8]),
                seed=i,
                ignore_eos=True,
                detokenize=False,
            )
        )
    return prompts, params


def tokens(llm, prompts, params):
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone(models):
    """What each request yields when nothing else is in the engine, and nothing is cached."""
    prompts, params = requests()
    result = {}
    for name, path in models.items():
        llm = load(path, max_num_seqs=1, enable_prefix_caching=False)
        result[name] = [tokens(llm, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    return result


@pytest.fixture(scope="module")
def alone_int8(models):
    prompts, params = requests()
    result = {}
    for name, path in models.items():
        options = {"cache": "paged-int8", "max_num_seqs": 1, "enable_prefix_caching": False}
        llm = load(path, **options)
        result[name] = [tokens(llm, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    return result


MODELS = ["plain", "window", "both"]
# About 16 blocks: layers times K and V times two heads of 16, in float32.
SMALL = {"plain": 2 * 16 * 4096, "window": 2 * 16 * 4096, "both": 4 * 16 * 4096}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheduler", ["continuous", "static", "dynamic"])
@pytest.mark.parametrize(
    "options",
    [
        {"cache": "paged"},
        {"cache": "paged", "small": True},
        {"cache": "paged", "max_num_batched_tokens": 24, "max_num_seqs": 7},
        {"cache": "paged", "enable_prefix_caching": False, "small": True},
        {"cache": "paged", "block_size": 32},
        {"cache": "contiguous", "max_num_seqs": 5},
    ],
    ids=["paged", "small", "chunks", "no-prefix", "block-32", "contiguous"],
)
def test_a_request_does_not_feel_its_neighbours(models, alone, model, scheduler, options):
    prompts, params = requests()
    options = dict(options)
    if options.pop("small", False):
        options["kv_cache_memory"] = SMALL[model]
    llm = load(models[model], scheduler=scheduler, **options)
    assert tokens(llm, prompts, params) == alone[model]
    cache = llm.built.cache
    cache.check_integrity()
    stats = cache.stats()
    assert stats["num_free_blocks"] == stats["num_blocks"]
    if "kv_cache_memory" not in options and options["cache"] == "paged":
        assert stats["hit_tokens"] > 0
    assert tokens(llm, prompts, params) == alone[model]  # now with a warm cache
    cache.check_integrity()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"small": True}, {"max_num_batched_tokens": 24, "max_num_seqs": 7, "threads": 2}],
)
def test_nor_with_int8_keys_and_values(models, alone, alone_int8, model, options):
    prompts, params = requests()
    options = dict(options)
    if options.pop("small", False):
        options["kv_cache_memory"] = SMALL[model] * (16 + 4) // (16 * 4)
    llm = load(models[model], kv_cache_dtype="int8", **options)
    assert llm.built.cache.name == "paged-int8"
    assert tokens(llm, prompts, params) == alone_int8[model]
    llm.built.cache.check_integrity()
    assert tokens(llm, prompts, params) == alone_int8[model]  # now with a warm cache
    pairs = zip(alone[model], alone_int8[model], strict=True)
    same = [a == b for one, other in pairs for a, b in zip(one, other, strict=True)]
    assert 0.5 < sum(same) / len(same)


@pytest.mark.parametrize("model", MODELS)
def test_completions_share_the_prompt_and_differ(models, model):
    llm = load(models[model])
    prompt = list(range(40))
    params = SamplingParams(
        n=4, max_tokens=20, temperature=1.0, seed=3, ignore_eos=True, detokenize=False
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    lines = {tuple(completion.token_ids) for completion in output.outputs}
    assert len(output.outputs) == len(lines) == 4
    assert llm.built.cache.stats()["copies"] > 0
    llm.built.cache.check_integrity()


@pytest.mark.parametrize("cache", ["paged", "paged-int8"])
@pytest.mark.parametrize("model", MODELS)
def test_the_reference_attention_agrees(models, alone, alone_int8, model, cache):
    prompts, params = requests()
    llm = load(models[model], attention="reference", cache=cache)
    greedy = [i for i, p in enumerate(params) if p.temperature == 0]
    got = tokens(llm, [prompts[i] for i in greedy], [params[i] for i in greedy])
    want = alone if cache == "paged" else alone_int8
    assert got == [want[model][i] for i in greedy]


@pytest.mark.skipif(
    "fair" not in Registry.load().names("scheduler"),
    reason="examples/python-plugin is not installed",
)
@pytest.mark.parametrize("model", MODELS)
def test_example_plugins_in_the_engine(models, alone, model):
    prompts, params = requests()
    memory = SMALL[model]
    llm = load(models[model], scheduler="fair", proposer="last-words", kv_cache_memory=memory)
    assert tokens(llm, prompts, params) == alone[model]
    llm.built.cache.check_integrity()


@pytest.mark.parametrize("bits", [4, 8])
def test_rtn_runs_and_is_close_to_itself_in_any_batch(models, bits):
    prompts, params = requests()
    llm = load(models["plain"], quantizer="rtn", bits=bits)
    together = tokens(llm, prompts, params)
    one = load(models["plain"], quantizer="rtn", bits=bits, max_num_seqs=1)
    for index in (0, 5, 11):
        assert tokens(one, [prompts[index]], [params[index]]) == [together[index]]
