"""``LLM``: vLLM's words and shapes."""

import itertools
import signal
import threading
import time

import numpy as np
import pytest
from engine_fakes import VOCAB, FakeTokenizer, drain, fake_built, greedy

from pyllmlite.core.errors import RequestError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.engine import Engine
from pyllmlite.engine.llm import LLM

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def ids_of(text):
    return [ord(c) - 32 for c in text]


def made(**options):
    return LLM.from_built(fake_built(**options))


def test_prompts_of_every_shape_in_order():
    llm = made()
    prompts = ["hello", [1, 2, 3], {"prompt_token_ids": [9, 8]}, {"prompt": "abc"}]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    want = [ids_of("hello"), [1, 2, 3], [9, 8], ids_of("abc")]
    assert [o.prompt_token_ids for o in outputs] == want
    assert [o.prompt for o in outputs] == ["hello", None, None, "abc"]
    assert [o.outputs[0].token_ids for o in outputs] == [greedy(w, 6, None) for w in want]
    assert len({o.request_id for o in outputs}) == 4
    for output in outputs:
        metrics = output.metrics
        assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def test_one_prompt_is_a_list_of_one():
    llm = made()
    for prompt in ("hello", [1, 2, 3], {"prompt": "x"}):
        assert len(llm.generate(prompt, GREEDY, use_tqdm=False)) == 1
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_parameters_for_each_prompt():
    llm = made()
    params = [SamplingParams(temperature=0, max_tokens=k, ignore_eos=True) for k in (1, 5)]
    outputs = llm.generate(["aa", "bb"], params, use_tqdm=False, priority=[1, 0])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 5]
    with pytest.raises(RequestError, match="2 sampling_params for 3 prompts"):
        llm.generate(["a", "b", "c"], params)


def test_a_bad_prompt_in_a_list_lets_none_run():
    llm = made()
    with pytest.raises(RequestError, match="empty"):
        llm.generate(["fine", "", "fine"], GREEDY)
    assert llm.built.program.tokens_run == 0 and not llm.engine.has_unfinished
    llm.engine.check_integrity()
    assert llm.generate("fine", GREEDY, use_tqdm=False)[0].finished


def test_chat_uses_the_template():
    llm = made()
    conversation = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt == "[user]hi"
    assert len(llm.chat([conversation, conversation], GREEDY, use_tqdm=False)) == 2
    with pytest.raises(RequestError, match="messages"):
        llm.chat(["hi"], GREEDY)


def test_chat_does_not_add_what_the_template_has_written(monkeypatch):
    llm = made()

    class WithBos(FakeTokenizer):
        def encode(self, text, add_special_tokens=True):
            return [77] * add_special_tokens + super().encode(text)

    monkeypatch.setattr(llm.built, "tokenizer", WithBos())
    conversation = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == ids_of("[user]hi")
    (output,) = llm.generate("hi", GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == [77, *ids_of("hi")]


def test_stream_grows_to_what_generate_gives():
    llm = made()
    expected = llm.generate("hello", GREEDY, use_tqdm=False)[0]
    outputs = list(llm.stream("hello", GREEDY))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3, 4, 5, 6]
    assert [o.finished for o in outputs] == [False] * 5 + [True]
    for a, b in itertools.pairwise(outputs):
        assert b.outputs[0].text.startswith(a.outputs[0].text)
    assert outputs[-1].outputs == expected.outputs


def test_streams_side_by_side_and_one_left_early():
    llm = made()
    long = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    one, two = llm.stream("one", long), llm.stream([{"role": "user", "content": "x"}], long)
    for _ in range(3):
        next(one)
        next(two)
    one.close()
    assert len(llm.engine.requests) == 1
    assert llm.generate("between", GREEDY, use_tqdm=False)[0].finished
    last = list(two)[-1]
    assert last.outputs[0].token_ids == greedy(ids_of("[user]x"), 20, None)
    llm.engine.check_integrity()
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


def test_from_many_threads():
    llm = made()
    results = {}

    def work(i):
        results[i] = llm.generate([[i, i + 1]] * 3, GREEDY, use_tqdm=False)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        assert [o.outputs[0].token_ids for o in results[i]] == [greedy([i, i + 1], 6, None)] * 3


def test_a_short_request_beside_a_long_one_of_another_thread():
    llm = made(max_model_len=600, num_blocks=200)
    llm.built.program.before = lambda batch: threading.Event().wait(0.001)
    llm.built.program.logits = lambda history: np.ones(VOCAB, np.float32)
    long = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    thread = threading.Thread(target=llm.generate, args=([1, 2], long, False))
    thread.start()
    while not llm.engine.num_steps:
        time.sleep(0.001)
    llm.generate([3, 4], GREEDY, use_tqdm=False)
    assert thread.is_alive()
    thread.join()


def test_arrays_are_prompts():
    llm = made()
    for prompts in (np.array([1, 2, 3]), np.array([[1, 2, 3], [4, 5, 6]])):
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [o.prompt_token_ids for o in outputs] == np.atleast_2d(prompts).tolist()


@pytest.fixture
def ctrl_c():
    """Python's own handler, also where the tests run in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_a_usable_engine(ctrl_c):
    llm = made()
    calls = itertools.count()

    def interrupt(batch):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    llm.built.program.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=30, ignore_eos=True), use_tqdm=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not llm.engine.has_unfinished
    llm.engine.check_integrity()
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks
    assert llm.generate("a", GREEDY, use_tqdm=False)[0].finished


def test_progress_bar_is_told():
    told = []

    class Bar:
        def __init__(self, total, desc, **_):
            told.append((total, desc))

        def set_postfix_str(self, text, refresh):
            assert "tok/s" in text

        def update(self, count):
            told.append(count)

        def close(self):
            told.append("closed")

    made().generate(["a", "b"], GREEDY, use_tqdm=Bar)
    assert told == [(2, "Processed prompts"), 1, 1, "closed"]


def test_reset_prefix_cache():
    llm = made()
    prompt = [1] * 40
    cached = []
    for _ in range(2):
        cached.append(llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens)
    llm.reset_prefix_cache()
    cached.append(llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens)
    assert cached == [0, 32, 0]


def test_no_tokenizer():
    llm = made(tokenizer=False)
    assert llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs[0].text == ""
    with pytest.raises(RequestError, match="no tokenizer"):
        llm.generate("a", GREEDY)
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        llm.generate([1], SamplingParams(stop="a"))


def test_a_failed_request_says_why_and_the_rest_is_returned():
    llm = made()
    good = llm.generate("good", GREEDY, use_tqdm=False)[0]
    calls = itertools.count()

    def fail(batch):
        if next(calls) == 0:
            raise RuntimeError("once")

    llm.built.program.before = fail
    (bad,) = llm.generate("bad", GREEDY, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error" and "once" in bad.error
    assert llm.generate("good", GREEDY, use_tqdm=False)[0].outputs == good.outputs


def test_priority_runs_earlier():
    built = fake_built(max_num_seqs=1)
    engine = Engine(built)
    order = []
    for name, priority in (("a", 5), ("b", 0), ("c", 2)):
        engine.add(name, [1, 2], GREEDY, priority=priority)
    while engine.has_unfinished:
        order += [s.request.id for s in engine.step()]
    assert order == ["b", "c", "a"]
    assert drain(engine) == {}
