"""``n`` and ``best_of``: completions that share the prompt, and the best of them."""

import pytest
from text_model import write_text_model

from pyllmlite import LLM, SamplingParams
from pyllmlite.core.errors import RequestError

PROMPT = list(range(20, 120))


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(str(write_text_model(tmp_path_factory.mktemp("tiny"))), dtype="f32", block_size=16)


def test_the_prompt_is_held_once(llm):
    cache, engine = llm.built.cache, llm.engine
    engine.add("a", PROMPT, SamplingParams(n=8, seed=1, max_tokens=10, ignore_eos=True))
    most, counted = 0, engine.num_steps
    while engine.has_unfinished:
        engine.step()
        most = max(most, cache.num_blocks - cache.num_free_blocks)
        engine.check_integrity()
    # 6 full blocks of the prompt in common; each of the 8 has the seventh, half-filled one.
    assert most == 6 + 8
    assert engine.num_steps - counted <= 12  # the prompt ran once


def test_best_of_is_the_best_of_n(llm):
    every = SamplingParams(n=6, seed=3, max_tokens=12, logprobs=0)
    (all_six,) = llm.generate([PROMPT], every, use_tqdm=False)
    want = sorted(
        all_six.outputs, key=lambda c: c.cumulative_logprob / len(c.token_ids), reverse=True
    )
    for logprobs in (None, 0):
        best = SamplingParams(n=2, best_of=6, seed=3, max_tokens=12, logprobs=logprobs)
        (output,) = llm.generate([PROMPT], best, use_tqdm=False)
        assert [c.token_ids for c in output.outputs] == [c.token_ids for c in want[:2]]
        assert [c.index for c in output.outputs] == [0, 1]
        for ours, other in zip(output.outputs, want, strict=False):
            assert ours.logprobs == (None if logprobs is None else other.logprobs)


def test_best_of_is_checked(llm):
    for words, message in (
        ({"n": 3, "best_of": 2}, "best_of must be an integer of at least 3"),
        ({"best_of": 2, "temperature": 0}, "best_of > 1 with temperature 0"),
        ({"best_of": 10**6}, "best_of must be at most"),
    ):
        with pytest.raises(RequestError, match=message):
            SamplingParams(**words)
    with pytest.raises(RequestError, match="cannot be streamed"):
        list(llm.stream(PROMPT, SamplingParams(best_of=2)))
    (output,) = llm.generate([PROMPT], SamplingParams(n=2, best_of=2, seed=1), use_tqdm=False)
    assert len(output.outputs) == 2
