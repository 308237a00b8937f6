"""``prompt-lookup``: what it proposes, how much of it, and that the output stays what it was."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from text_model import write_text_model

from pyllmlite import LLM, SamplingParams
from pyllmlite.core.errors import ConfigError, RequestError
from pyllmlite.hooks.decoder import DecoderContext
from pyllmlite.model.hub import resolve
from pyllmlite.testing import ProposerConformance
from pyllmlite_plugins.decoder.draft_length import FIRST_WAIT, TRIAL, DraftLength, best_length
from pyllmlite_plugins.decoder.ngram_index import NgramIndex
from pyllmlite_plugins.decoder.prompt_lookup import PromptLookup


class TestPromptLookup(ProposerConformance):
    strategy = PromptLookup


# -- the index -----------------------------------------------------------------------------------
def find_by_hand(ids, smallest, largest):
    """Every n from the largest, every place from the latest."""
    for n in range(min(largest, len(ids) - 1), smallest - 1, -1):
        for end in range(len(ids) - 1, n - 1, -1):
            if ids[end - n : end] == ids[len(ids) - n :]:
                return n, end
    return 0, 0


@pytest.mark.parametrize(("smallest", "largest"), [(1, 1), (1, 4), (2, 8), (3, 3)])
@pytest.mark.parametrize("vocab", [2, 5, 40])
def test_index_finds_the_longest(smallest, largest, vocab, monkeypatch):
    monkeypatch.setattr("pyllmlite_plugins.decoder.ngram_index.MAX_CANDIDATES", 10_000)
    rng = random.Random(vocab)
    index, ids = NgramIndex(smallest, largest), []
    for _ in range(150):
        ids += [rng.randrange(vocab) for _ in range(rng.choice([0, 1, 1, 7]))]
        assert index.find(ids) == find_by_hand(ids, smallest, largest)


def test_index_looks_at_so_many_places():
    index = NgramIndex(2, 8)
    ids = [9, 9, 9, 1, 2] + [3, 1, 2] * 50 + [9, 9, 9, 1, 2]
    assert index.find(ids) == (2, len(ids) - 5)  # the longer one is too far back


# -- the draft length ----------------------------------------------------------------------------
def test_best_length():
    for batch, cost in ((1, 0.15), (8, 0.15), (1, 0.5), (64, 0.01)):
        share = cost * batch / (1 - cost + cost * batch)
        lengths = []
        for percent in range(0, 100, 3):
            p = percent / 100
            gains = [sum(p**i for i in range(k + 1)) / (1 + share * k) for k in range(17)]
            best = best_length(percent, batch, cost, 16)
            assert gains[best] == pytest.approx(max(gains)) or max(gains) <= 1.03 and best == 0
            lengths.append(best)
        assert lengths == sorted(lengths) and lengths[0] == 0
    assert best_length(99, 1, 0.15, 0) == 0


def test_length_falls_to_zero_is_tried_again_and_recovers():
    length = DraftLength(3)
    lengths = []
    for _ in range(1000):
        lengths.append(length.choose(2, 1, 0.15, 16))
        if lengths[-1]:
            length.learn(lengths[-1], 0)
    assert lengths[0] > 0
    late = lengths[200:]
    assert set(late) == {0, TRIAL} and 5 < sum(late) / TRIAL < 15  # one in 64
    for _ in range(200):
        n = length.choose(2, 1, 0.15, 16)
        if n:
            length.learn(n, n)
    assert length.choose(2, 1, 0.15, 16) == 16
    assert length.choose(1, 1, 0.15, 16) == lengths[0]  # the other kinds are as they were


def test_nothing_is_tried_where_nothing_can_pay():
    length = DraftLength(1)
    assert not any(length.choose(0, 1000, 0.5, 16) for _ in range(10 * FIRST_WAIT))


# -- what is proposed ----------------------------------------------------------------------------
def proposal(ids, room=16, **extra):
    options = {"draft_token_cost": 0.01} | extra
    proposer = PromptLookup(DecoderContext(1000, 512, (0,), extra=options))
    seq = SimpleNamespace(id=1, token_ids=ids)
    proposer.open(seq)
    return list(proposer.propose(seq, room))


def test_proposals():
    assert proposal([1, 2, 3, 4, 5, 6, 1, 2], 3) == [3, 4, 5]
    assert proposal([1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3], 2) == [4, 9]  # the longer n-gram first
    assert proposal([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]  # of two, the later
    assert proposal([5, 6, 7, 5, 6, 7, 5, 6], 7) == [7, 5, 6, 7, 5, 6, 7]  # a cycle goes on
    for ids in ([], [1], [1, 2], [1, 2, 3, 4], [1, 2, 1]):
        assert proposal(ids) == []
    assert proposal([1, 2, 1], prompt_lookup_min=1) != []
    assert len(proposal([1, 1, 1, 1], num_speculative_tokens=2)) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"prompt_lookup_min": 3, "prompt_lookup_max": 2}, "is less than prompt_lookup_min"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be an integer"),
        ({"draft_token_cost": 1.5}, r"draft_token_cost must be in \(0, 1\)"),
    ],
)
def test_options_are_checked(extra, message):
    with pytest.raises(ConfigError, match=message):
        PromptLookup(DecoderContext(10, 10, (0,), extra=extra))


# -- in the engine -------------------------------------------------------------------------------
VOCAB = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_text_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory):
    """Eight tokens, so that everything repeats."""
    from safetensors.numpy import load_file, save_file

    path = write_text_model(tmp_path_factory.mktemp("eight"))
    config = json.loads((path / "config.json").read_text())
    config |= {"vocab_size": VOCAB, "eos_token_id": 0}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:VOCAB] * 2
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.mark.parametrize("ask", [{"temperature": 0}, {"temperature": 0.7, "n": 3}], ids=str)
def test_output_is_as_without(model, ask):
    rng = random.Random(3)
    line = [rng.randrange(256) for _ in range(20)]
    prompts = [line * 3, line + line[:5], [7], [5, 5], line[:3] * 9]
    # Eight rows for 15 sequences, and few blocks: some wait, some are preempted.
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "kv_cache_memory": "200KB"}
    llm = LLM(
        model, dtype="f32", max_model_len=200, proposer="prompt-lookup", **options,
        extra={"draft_token_cost": 0.01},
    )  # fmt: skip
    asked = [
        SamplingParams(max_tokens=60, seed=i, ignore_eos=True, **ask) for i in range(len(prompts))
    ]
    plain = [SamplingParams(**{**vars(p), "proposer": "none"}) for p in asked]
    drafted = llm.generate(prompts, asked, use_tqdm=False)
    steps = llm.engine.num_steps
    for a, b in zip(drafted, llm.generate(prompts, plain, use_tqdm=False), strict=True):
        assert a.error is None and a.outputs == b.outputs
    if ask["temperature"] == 0:
        assert steps < llm.engine.num_steps - steps
    llm.engine.check_integrity()
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


def test_distribution(small_vocabulary):
    """100,000 draws against the model's own probabilities: the counts of the best token, the
    second best, ... are a sum of independent draws, so their distances from the sums of the
    probabilities, measured by their covariance, follow chi-square with VOCAB - 1 degrees."""
    llm = LLM(
        small_vocabulary, dtype="f32", skip_tokenizer_init=True, proposer="prompt-lookup",
        max_num_seqs=64, max_logprobs=VOCAB,
        extra={"draft_token_cost": 0.001, "num_speculative_tokens": 4},
    )  # fmt: skip
    params = SamplingParams(
        temperature=1, max_tokens=400, logprobs=VOCAB, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([[i % VOCAB, i % 5, i % 7] for i in range(250)], params, use_tqdm=False)
    chosen, probabilities = [], []
    for output in outputs:
        for token, entries in zip(
            output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
        ):
            chosen.append(entries[token].rank - 1)
            probabilities.append(sorted((e.logprob for e in entries.values()), reverse=True))
    assert len(chosen) == 100_000
    assert llm.engine.num_steps < 0.9 * 100_000 / 64  # drafts were taken
    p = np.exp(np.array(probabilities))
    assert np.abs(p.sum(1) - 1).max() < 1e-5
    off = (np.bincount(chosen, minlength=VOCAB) - p.sum(0))[:-1]
    covariance = (np.diag(p.sum(0)) - p.T @ p)[:-1, :-1]
    assert off @ np.linalg.solve(covariance, off) < 24.32  # 99.9 percent, 7 degrees


def test_chosen_by_request(model):
    llm = LLM(model, dtype="f32", max_model_len=200)
    params = {"temperature": 0, "max_tokens": 80, "ignore_eos": True}
    prompt = list(range(60, 80)) * 3
    plain = llm.generate([prompt], SamplingParams(**params), use_tqdm=False)
    steps = llm.engine.num_steps
    asked = SamplingParams(**params, proposer="prompt-lookup")
    drafted = llm.generate([prompt], asked, use_tqdm=False)
    assert drafted[0].outputs == plain[0].outputs
    assert llm.engine.num_steps - steps < steps
    with pytest.raises(RequestError, match="did you mean 'prompt-lookup'"):
        llm.generate([prompt], SamplingParams(proposer="prompt-lokup"), use_tqdm=False)
    with pytest.raises(RequestError, match="is a selector, not a proposer"):
        llm.generate([prompt], SamplingParams(proposer="sample"), use_tqdm=False)


def test_smollm2_repeats_a_text():
    """The default model, greedy: the same tokens in less than half of the steps."""
    llm = LLM(str(resolve(None, progress=False)), proposer="prompt-lookup", max_model_len=512)
    text = (
        "The old harbour of Lindau lies at the eastern end of the lake. In the morning the "
        "fishermen bring their boats to the pier and sell what they have caught during the night."
    )
    ask = [{"role": "user", "content": "Repeat the following text exactly.\n\n" + text}]
    outputs, steps = [], []
    for proposer in ("none", None):
        before = llm.engine.num_steps
        params = SamplingParams(temperature=0, max_tokens=60, proposer=proposer)
        outputs.append(llm.chat(ask, params, use_tqdm=False)[0].outputs)
        steps.append(llm.engine.num_steps - before)
    assert outputs[0] == outputs[1]
    assert steps[1] < steps[0] / 2
