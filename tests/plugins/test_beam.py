"""``beam``: transformers' sequences and scores, and what happens around it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_models import _make, reference

from pyllmlite import LLM, BeamSearchParams, SamplingParams
from pyllmlite.core.errors import ConfigError, RequestError
from pyllmlite.hooks.decoder import Constraint, DecoderContext
from pyllmlite.testing import DecoderConformance
from pyllmlite_plugins.decoder.beam import Beam

VOCAB, WIDTH, TOKENS = 40, 4, 20


class TestBeam(DecoderConformance):
    strategy = Beam


class TestThreeBest(DecoderConformance):
    strategy = Beam
    params = {"n": 3, "extra_args": {"beam_width": 5}}


class TestOneBeam(DecoderConformance):
    strategy = Beam
    params = {"extra_args": {"beam_width": 1, "early_stopping": True}}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A vocabulary so small, and an end token so likely, that beams end at all lengths."""
    path = _make("LlamaConfig", {"vocab_size": VOCAB}, tmp_path_factory.mktemp("beam"))
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][2] *= 1.7
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def model(path):
    return reference(path)


def load(path, **options):
    options = {"max_num_seqs": 64, "max_model_len": 128} | options
    return LLM(str(path), dtype="f32", skip_tokenizer_init=True, threads=1, **options)


@pytest.fixture(scope="module")
def llm(path):
    return load(path)


def prompts(count, length, seed=5):
    return np.random.default_rng(seed).integers(3, VOCAB, (count, length)).tolist()


def by_transformers(model, asked, **words):
    """(tokens, score) of all beams, for prompts of one length."""
    import torch

    ids = torch.tensor(asked)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=WIDTH, num_return_sequences=WIDTH,
        do_sample=False, max_new_tokens=TOKENS, return_dict_in_generate=True, output_scores=True,
        **words,
    )  # fmt: skip
    found = []
    for sequence, score in zip(out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        tokens = sequence[len(asked[0]) :]
        if 2 in tokens:
            tokens = tokens[: tokens.index(2) + 1]
        found.append((tokens, score))
    return [found[i : i + WIDTH] for i in range(0, len(found), WIDTH)]


def by_us(llm, asked, length_penalty=1.0, **words):
    params = SamplingParams(
        decoder="beam", n=WIDTH, max_tokens=TOKENS, detokenize=False, extra_args=
        {"beam_width": WIDTH, "length_penalty": length_penalty, **words},
    )  # fmt: skip
    outputs = llm.generate(asked, params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [
        [
            (c.token_ids, c.cumulative_logprob / len(c.token_ids) ** length_penalty)
            for c in output.outputs
        ]
        for output in outputs
    ]


def assert_same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in other]
        assert [s for _, s in mine] == pytest.approx([s for _, s in other], rel=1e-5)


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty"),
    [(False, 1.0), (True, 1.0), ("never", 1.0), (False, 0.0), ("never", -0.7), (True, 2.0),
     (False, -1.0), ("never", 2.5)],
)  # fmt: skip
def test_same_as_transformers(model, llm, early_stopping, length_penalty):
    words = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    asked = prompts(10, 7)
    theirs = by_transformers(model, asked, **words)
    ended = [tokens[-1] == 2 for beams in theirs for tokens, _ in beams]
    assert any(ended)
    assert_same(by_us(llm, asked, **words), theirs)
    llm.engine.check_integrity()
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


def test_with_too_few_rows_and_blocks(model, path):
    """Beams wait for a row, requests give way to each other: the result stays."""
    asked = prompts(4, 17)
    llm = load(path, max_num_seqs=3, max_num_batched_tokens=16, kv_cache_memory="60KB",
               max_model_len=48)  # fmt: skip
    assert_same(by_us(llm, asked), by_transformers(model, asked))
    llm.engine.check_integrity()
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


def test_several_end_tokens_and_min_tokens(model, llm):
    asked = prompts(5, 1, seed=8)
    theirs = by_transformers(model, asked, eos_token_id=[2, 9, 11], min_new_tokens=5)
    params = SamplingParams(
        decoder="beam", n=WIDTH, max_tokens=TOKENS, min_tokens=5, stop_token_ids=[9, 11],
        detokenize=False, logprobs=0,
    )  # fmt: skip
    for output, other in zip(llm.generate(asked, params, use_tqdm=False), theirs, strict=True):
        for completion, (tokens, score) in zip(output.outputs, other, strict=True):
            end = next((i for i, t in enumerate(tokens) if t in (9, 11)), len(tokens) - 1)
            assert completion.token_ids == tokens[: end + 1]
            assert completion.cumulative_logprob / (end + 1) == pytest.approx(score, rel=1e-5)
            assert len(completion.logprobs) == end + 1 and end >= 5 or tokens[end] not in (2, 9, 11)


def test_one_beam_is_greedy(llm):
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, detokenize=False)
    beam = SamplingParams(
        decoder="beam", max_tokens=TOKENS, detokenize=False,
        extra_args={"beam_width": 1, "early_stopping": True},
    )  # fmt: skip
    asked = prompts(6, 4)
    for a, b in zip(
        llm.generate(asked, greedy, use_tqdm=False),
        llm.generate(asked, beam, use_tqdm=False),
        strict=True,
    ):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids


def test_beam_search_call(model, llm):
    asked = prompts(3, 6)
    words = {"early_stopping": True, "length_penalty": 0.5}
    params = BeamSearchParams(beam_width=WIDTH, max_tokens=TOKENS, **words)
    outputs = llm.beam_search(asked, params)
    for prompt, output, other in zip(
        asked, outputs, by_transformers(model, asked, **words), strict=True
    ):
        assert [s.tokens for s in output.sequences] == [prompt + tokens for tokens, _ in other]
        assert [s.score for s in output.sequences] == pytest.approx([s for _, s in other], rel=1e-5)
        assert output.sequences[0].cum_logprob < output.sequences[0].score < 0


def test_beside_other_requests(llm):
    asked = prompts(3, 9)
    alone = by_us(llm, asked[:1])
    beam = SamplingParams(decoder="beam", n=WIDTH, max_tokens=TOKENS, detokenize=False)
    other = SamplingParams(n=2, seed=1, max_tokens=30, detokenize=False)
    outputs = llm.generate(asked, [beam, other, beam], use_tqdm=False)
    assert [c.token_ids for c in outputs[0].outputs] == [tokens for tokens, _ in alone[0]]
    assert len(outputs[1].outputs) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"top_p": 0.9}, "no top_p"),
        ({"repetition_penalty": 1.1}, "no repetition_penalty"),
        ({"temperature": 0.5}, "no temperature"),
        ({"best_of": 2}, "no best_of"),
        ({"n": 5}, "more than beam_width"),
        ({"extra_args": {"beam_width": 11}}, "looks at 22 tokens a beam"),
        ({"extra_args": {"beam_width": 0}}, "beam_width must be"),
        ({"extra_args": {"early_stopping": "soon"}}, "early_stopping must be"),
        ({"extra_args": {"length_penalty": float("nan")}}, "length_penalty must be"),
        ({"proposer": "prompt-lookup"}, "does not work with proposer 'prompt-lookup'"),
    ],
)
def test_what_cannot_work_is_refused(llm, words, message):
    with pytest.raises(RequestError, match=message):
        llm.generate([[5]], SamplingParams(decoder="beam", **words), use_tqdm=False)


def test_no_proposer_at_load(path):
    with pytest.raises(ConfigError, match="'beam' does not work with proposer 'prompt-lookup'"):
        load(path, decoder="beam", proposer="prompt-lookup")


# -- under constraints -----------------------------------------------------------------------------
class Follows(Constraint):
    """Token t is followed by one of every third, from t % 3 on; the end token after 5 tokens."""

    name = "test-follows"

    @classmethod
    def applies(cls, params):
        return params.extra_args.get("follows", False)

    def open(self, seq):
        return list(seq.token_ids[-1:])

    @staticmethod
    def allowed(last, length):
        return [t for t in range(VOCAB) if t % 3 == last % 3 and t != 2] + [2] * (length >= 5)

    def mask(self, state):
        bits = np.zeros(-(-VOCAB // 32), np.uint32)
        for token in self.allowed(state[-1], len(state) - 1):
            bits[token >> 5] |= np.uint32(1 << (token & 31))
        return bits

    def accept(self, state, token_id):
        assert token_id in self.allowed(state[-1], len(state) - 1)
        state.append(token_id)

    def rollback(self, state, num_tokens):
        del state[-num_tokens:]

    def fork(self, state):
        return list(state)


@pytest.fixture(scope="module")
def constrained(path):
    llm = load(path)
    context = DecoderContext(VOCAB, 128, (2,))
    llm.built.constraints.append(Follows(context))
    return llm


@pytest.mark.parametrize("words", [{}, {"early_stopping": True, "length_penalty": 0.3}])
def test_under_a_constraint_same_as_transformers(model, constrained, words):
    asked = prompts(10, 7, seed=3)

    def allowed(batch_id, ids):
        return Follows.allowed(int(ids[-1]), len(ids) - 7)

    theirs = by_transformers(model, asked, prefix_allowed_tokens_fn=allowed, **words)
    assert any(tokens[-1] == 2 for beams in theirs for tokens, _ in beams)
    assert_same(by_us(constrained, asked, follows=True, **words), theirs)
    assert by_us(constrained, asked, **words) != theirs
    constrained.engine.check_integrity()


def test_where_fewer_tokens_are_allowed_than_beams(path):
    """One token, then two, then two: four continuations, and no fifth."""

    class Narrow(Follows):
        @staticmethod
        def allowed(last, length):
            return [[5], [7, 9], [11, 13], [2]][min(length, 3)]

    llm = load(path)
    llm.built.constraints.append(Narrow(DecoderContext(VOCAB, 128, (2,))))
    params = SamplingParams(
        decoder="beam", n=6, max_tokens=TOKENS, detokenize=False,
        extra_args={"beam_width": 6, "follows": True},
    )  # fmt: skip
    (output,) = llm.generate([[3, 4]], params, use_tqdm=False)
    assert output.error is None
    found = [tuple(c.token_ids) for c in output.outputs]
    assert sorted(found) == [(5, a, b, 2) for a in (7, 9) for b in (11, 13)]
    sums = [c.cumulative_logprob for c in output.outputs]
    assert sums == sorted(sums, reverse=True)


@pytest.mark.parametrize("rows", [2, 3, 16])
@pytest.mark.parametrize("follows", [True, False])
def test_every_token_has_its_log_probability(path, rows, follows):
    """Also where a beam waited for a row between finding a token and taking it."""
    llm = load(path, max_num_seqs=rows)
    llm.built.constraints.append(Follows(DecoderContext(VOCAB, 128, (2,))))
    params = SamplingParams(
        decoder="beam", n=WIDTH, max_tokens=TOKENS, detokenize=False, logprobs=2,
        extra_args={"beam_width": WIDTH, "follows": follows},
    )  # fmt: skip
    for output in llm.generate(prompts(3, 5), params, use_tqdm=False):
        for completion in output.outputs:
            entries = zip(completion.token_ids, completion.logprobs, strict=True)
            total = sum(entry[token].logprob for token, entry in entries)
            assert total == pytest.approx(completion.cumulative_logprob, rel=1e-5)
            assert all(2 <= len(entry) <= 3 for entry in completion.logprobs)
