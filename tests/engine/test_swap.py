"""Preempted sequences that wait in the swap space: every request ends with its own tokens."""

from __future__ import annotations

import random

import pytest
from engine_fakes import VOCAB, drain, fake_built, greedy
from text_model import write_text_model

from pyllmlite import LLM, SamplingParams
from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import CapacityError, ConfigError, PluginError
from pyllmlite.engine.engine import Engine
from pyllmlite.hooks.decoder import Proposer
from pyllmlite.model.preemption import cheaper_to_swap
from pyllmlite.runtime.cost import OpCost
from pyllmlite.runtime.program import OpEntry
from pyllmlite_plugins.cache.paged import Paged


class Guess(Proposer):
    """Drafts that hold now and then."""

    name = "guess"

    def propose(self, seq, max_tokens):
        right = greedy(seq.token_ids, 3)
        return right[: seq.num_tokens % 4] + [7] if seq.num_tokens % 3 else []


def prompts_of(rng, count):
    start = [rng.randrange(VOCAB - 1) for _ in range(20)]
    return [
        start[: rng.randint(0, 20)] + [rng.randrange(VOCAB - 1) for _ in range(rng.randint(1, 25))]
        for _ in range(count)
    ]


def fake_engine(seed, **options):
    """A pool in which two of ten sequences fit, and a policy that swaps half of the time."""
    rng = random.Random(seed)
    asked = []

    def worth(tokens, num_bytes):
        asked.append((tokens, num_bytes))
        return rng.random() < 0.7

    built = fake_built(num_blocks=rng.choice([5, 7]), swap_blocks=rng.choice([2, 6, 30]),
                       worth_swapping=worth, **options)  # fmt: skip
    return Engine(built), rng, asked


@pytest.mark.parametrize("scheduler", ["continuous", "static"])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_ends_with_the_tokens_it_yields_alone(scheduler, prefix_caching, seed):
    engine, rng, asked = fake_engine(
        seed, scheduler=scheduler, prefix_caching=prefix_caching, proposer=Guess
    )
    alone = Engine(fake_built(prefix_caching=False))
    wanted = {}
    for i, prompt in enumerate(prompts_of(rng, 14)):
        params = SamplingParams(
            temperature=0.5, seed=i, max_tokens=rng.randint(1, 18), n=rng.choice([1, 3])
        )
        engine.add(str(i), {"prompt_token_ids": prompt}, params, priority=rng.choice([0, 0, 1]))
        alone.add(str(i), {"prompt_token_ids": prompt}, params)
        (output,) = drain(alone, check=False).values()
        wanted[str(i)] = [c.token_ids for c in output.outputs]
    for gone in ("3", "8"):
        for _ in range(3):
            engine.step()
        engine.abort(gone)
        del wanted[gone]
    done = drain(engine)
    for name, tokens in wanted.items():
        if name in done:  # the others ended in the steps before an abort
            assert [c.token_ids for c in done[name].outputs] == tokens
    stats = engine.built.cache.stats()
    assert asked and stats["swapped_blocks"] > 0
    assert stats["num_free_blocks"] == stats["num_blocks"]
    assert stats["num_free_swap_blocks"] == sum(engine.built.cache.swap_counts)


def test_a_swapped_sequence_computes_nothing_twice():
    """Recomputing costs tokens, swapping none."""
    prompts = [[i] * 20 for i in range(4)]
    run = {}
    for mode in (True, False):
        built = fake_built(
            num_blocks=6, swap_blocks=20, max_num_seqs=4, worth_swapping=lambda t, b, m=mode: m
        )
        engine = Engine(built)
        for i, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
            engine.add(str(i), {"prompt_token_ids": prompt}, params)
        done = drain(engine)
        for i, prompt in enumerate(prompts):
            assert done[str(i)].outputs[0].token_ids == greedy(prompt, 20, eos=None)
        assert engine.pool.preemptions > 0
        run[mode] = built.program.tokens_run
    assert run[True] == 4 * (20 + 19) < run[False]


def test_scores_of_a_prompt_go_on_where_they_were():
    prompt = list(range(40))
    alone = Engine(fake_built(max_num_batched_tokens=8))
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1, logprobs=1)
    alone.add("a", {"prompt_token_ids": prompt}, params)
    want = drain(alone)["a"]
    engine = Engine(
        fake_built(max_num_batched_tokens=8, swap_blocks=8, worth_swapping=lambda t, b: True)
    )
    engine.add("a", {"prompt_token_ids": prompt}, params)
    for _ in range(3):
        engine.step()
    engine.pool.preempt(engine.pool.running[0])
    got = drain(engine)["a"]
    assert got.prompt_logprobs == want.prompt_logprobs
    assert got.outputs[0].logprobs == want.outputs[0].logprobs
    assert engine.built.program.tokens_run == alone.built.program.tokens_run


def test_a_step_that_fails_takes_what_waits_with_it():
    """Its copies may not have been made: those who wait compute everything again."""
    built = fake_built(swap_blocks=20, max_num_seqs=2, worth_swapping=lambda t, b: True)
    engine = Engine(built)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    for name in ("a", "b"):
        engine.add(name, {"prompt_token_ids": [ord(name) - 90] * 20}, params)
    for _ in range(2):
        engine.step()
    engine.pool.preempt(engine.pool.running[1])
    # The copies are lost, as if the Program had failed before its first op.
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda step: [step.run(seq) for seq in step.running]
    built.program.before = lambda batch: 1 / 0
    engine.step()
    engine.scheduler.schedule, built.program.before = schedule, lambda batch: None
    for slots in built.program.slots:
        slots[built.cache.num_blocks * 16 :] = -5
    done = drain(engine)
    done.pop("a", None)
    assert done["b"].outputs[0].token_ids == greedy([ord("b") - 90] * 20, 10, eos=None)


# -- the model itself ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_text_model(tmp_path_factory.mktemp("swap")))


def load(path, **options):
    options = {"threads": 2, "skip_tokenizer_init": True, "max_model_len": 96} | options
    return LLM(path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_dtype": "int8"},
        {"sliding_window": 24, "attention_sinks": 4},
        {"enable_prefix_caching": False, "scheduler": "dynamic"},
        {"proposer": "prompt-lookup", "block_size": 32},
    ],
)
def test_on_a_model_too(path, options):
    rng = random.Random(1)
    prompts = [[rng.randrange(250) for _ in range(10 + i)] * (1 + i % 2) for i in range(12)]
    asked = [
        SamplingParams(max_tokens=40, temperature=0.7, seed=i, n=1 + i % 2, ignore_eos=True,
                       detokenize=False) for i in range(12)
    ]  # fmt: skip
    alone = load(path, max_num_seqs=2, **{**options, "enable_prefix_caching": False})
    pairs = list(zip(prompts, asked, strict=True))
    wanted = [alone.generate([p], a, use_tqdm=False)[0] for p, a in pairs]
    per_block = alone.built.cache.nbytes // alone.built.cache.num_blocks
    block = alone.built.cache.block_size
    few = (-(-96 // block) + 2) * per_block
    for mode in ("swap", "auto", "recompute"):
        llm = load(path, max_num_seqs=12, kv_cache_memory=few, swap_space="2MB",
                   preemption_mode=mode, **options)  # fmt: skip
        for got, want in zip(llm.generate(prompts, asked, use_tqdm=False), wanted, strict=True):
            assert got.error is None
            assert [c.token_ids for c in got.outputs] == [c.token_ids for c in want.outputs]
        llm.engine.check_integrity()
        assert f"swap 2 MB ({mode})" in llm.explain()
        assert llm.engine.pool.preemptions > 0
        swapped = llm.built.cache.stats()["swapped_blocks"]
        assert swapped > 0 if mode == "swap" else mode == "auto" or swapped == 0


# -- the choice ------------------------------------------------------------------------------------
def test_the_cost_model_weighs_bytes_against_arithmetic():
    ops = [
        OpEntry("layers.0.qkv", "linear", (), OpCost(token_macs=1e6, mac_dtype="int8")),
        OpEntry("layers.0.attention", "attention", (), OpCost(context_macs=1e3, mac_dtype="bf16")),
        OpEntry("head", "linear", (), OpCost(token_macs=1e12, per_logit_row=True)),
    ]
    peaks = {"int8": 1e12, "bf16": 1e11, "f32": 1e10}
    worth = cheaper_to_swap(ops, 4e9, peaks)
    # 100 tokens: (1e8 / 1e12 + 5050 * 1e3 / 1e11) / 0.6 s again, bytes / 1e9 s there and back.
    seconds = (1e8 / 1e12 + 5050e3 / 1e11) / 0.6
    assert worth(100, int(seconds * 1e9) - 1) and not worth(100, int(seconds * 1e9) + 1)
    windowed = [ops[0], OpEntry("a", "attention", (), OpCost(context_macs=1e3, window=10))]
    seconds = (1e8 / 1e12 + (55 + 90 * 10) * 1e3 / 1e10) / 0.6
    worth = cheaper_to_swap(windowed, 4e9, peaks)
    assert worth(100, int(seconds * 1e9) - 1) and not worth(100, int(seconds * 1e9) + 1)


@pytest.mark.parametrize(
    ("given", "size"),
    [(0, 0), (None, 0), ("0", 0), (4, 4 << 30), ("0.5", 1 << 29), ("512MB", 512 * 10**6)],
)
def test_swap_space_is_vllms_word(given, size):
    assert EngineConfig.from_kwargs(swap_space=given).swap_bytes == size


def test_what_cannot_work_is_refused(path):
    for words in (
        {"swap_space": -1},
        {"swap_space": "much"},
        {"swap_space": True},
        {"preemption_mode": "swap"},
        {"preemption_mode": "never", "swap_space": 1},
    ):
        with pytest.raises(ConfigError):
            EngineConfig(**words)
    with pytest.raises(CapacityError, match="do not hold one block"):
        load(path, swap_space="1kb")
    with pytest.raises(CapacityError, match="swap_space does not fit"):
        load(path, swap_space=10**6)

    class Old(Paged):
        name = "old"
        swaps = False

    from pyllmlite.hooks.cache import CacheNeeds, KVGroup
    from pyllmlite.hooks.registry import Registry

    needs = CacheNeeds("cpu", "f32", (KVGroup((0,), None),), 1, 1, 8, 64, 4, 64, 10**6,
                       swap_bytes=10**6)  # fmt: skip
    with pytest.raises(PluginError, match="has no swap space"):
        Registry.load().select("cache", Old, needs)
