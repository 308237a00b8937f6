"""Every request yields the tokens that the model says, however the steps were put together."""

import random

import numpy as np
import pytest
from engine_fakes import EOS, VOCAB, drain, fake_built, fake_logits, greedy, log_softmax

from pyllmlite.core.errors import RequestError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.engine import Engine
from pyllmlite.hooks.decoder import Constraint, Decoder, Proposer
from pyllmlite.hooks.scheduler import Scheduler


def one(built, prompt, check=True, **params):
    """A request alone; its output."""
    engine = Engine(built)
    engine.add("a", prompt, SamplingParams(**params))
    output = drain(engine, check)["a"]
    assert built.cache.num_free_blocks == built.cache.num_blocks
    return output


def prompt_of(seed, length):
    return random.Random(seed).choices(range(95), k=length)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 50])
def test_greedy_follows_the_model(length):
    prompt = prompt_of(length, length)
    out = one(fake_built(), prompt, temperature=0, max_tokens=10)
    assert out.outputs[0].token_ids == greedy(prompt, 10)
    assert out.finished and out.prompt_token_ids == prompt


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 9},
        {"max_tokens": 1, "n": 3},
        {"max_tokens": 12, "n": 3, "seed": 4},
        {"max_tokens": 12, "stop_token_ids": [7, 20, 41]},
        {"max_tokens": 40, "ignore_eos": True},  # to the end of max_model_len
        {"max_tokens": 9, "logprobs": 1},
    ],
)
def test_a_decoder_that_appends_by_itself_is_the_engines_own(params):
    class Appends(Decoder):
        name = "appends"
        calls = 0

        def advance(self, seq, result, actions):
            Appends.calls += 1
            actions.append(seq, result.tokens)

    params = {"seed": 1, "temperature": 0.8, **params}
    prompt = prompt_of(5, 33)
    ends = []
    for decoder in ("sample", "appends"):
        out = one(fake_built(decoders=[Appends], decoder=decoder, eos=()), prompt, **params)
        assert out.metrics.first_token_time <= out.metrics.finished_time
        ends.append([(o.token_ids, o.finish_reason, o.stop_reason) for o in out.outputs])
    assert ends[0] == ends[1]
    assert Appends.calls == sum(len(tokens) for tokens, _, _ in ends[0])


@pytest.mark.parametrize("cache", ["paged", "contiguous"])
@pytest.mark.parametrize("scheduler", ["continuous", "static"])
def test_a_request_does_not_feel_its_neighbours(cache, scheduler):
    """32 mixed requests through a small cache: chunked prefill, prefix hits, preemptions, n > 1,
    random sampling with seeds, scored prompts."""
    draw = random.Random(7)
    shared = prompt_of(1, 24)
    cases = []
    for i in range(32):
        prompt = prompt_of(100 + i, draw.choice([1, 3, 16, 17, 40, 55]))
        if i % 3 == 0:
            prompt = shared + prompt[:20]
        params = SamplingParams(
            temperature=0 if i % 4 == 0 else 0.8,
            seed=i,
            max_tokens=draw.choice([1, 5, 20]),
            n=3 if i % 8 == 5 else 1,
            ignore_eos=i % 2 == 0,
            prompt_logprobs=2 if i % 11 == 3 else None,
            logprobs=1 if i % 5 == 0 else None,
        )
        cases.append((prompt, params))

    def made():
        return fake_built(
            max_num_seqs=8, max_model_len=80, max_num_batched_tokens=24, scheduler=scheduler,
            cache=cache, num_blocks=14 if cache == "paged" else 20, block_size=16,
        )  # fmt: skip

    built = made()
    engine = Engine(built)
    states = []
    for i, (prompt, params) in enumerate(cases):
        states.append(engine.prepare(str(i), prompt, params))
        engine.submit(states[-1])
    together = drain(engine)
    if cache == "paged" and scheduler == "continuous":
        assert sum(s.preemptions for state in states for s in state.request.sequences) > 0
        assert built.cache.stats()["hit_tokens"] > 0
    assert built.cache.num_free_blocks == built.cache.num_blocks
    for i, (prompt, params) in enumerate(cases):
        alone = Engine(made())
        alone.add(str(i), prompt, params)
        expected = drain(alone)[str(i)]
        assert together[str(i)].outputs == expected.outputs, i
        assert together[str(i)].prompt_logprobs == expected.prompt_logprobs
        assert len(expected.outputs) == params.n


def test_chunked_prefill_asks_for_logits_once():
    built = fake_built(max_num_batched_tokens=8)
    asked = []
    built.program.before = lambda batch: asked.append((list(batch.counts), list(batch.wanted)))
    one(built, prompt_of(0, 20), temperature=0, max_tokens=1)
    assert asked == [([8], [0]), ([8], [0]), ([4], [1])]


def test_prefix_hits_run_less_and_say_so():
    built = fake_built()
    engine = Engine(built)
    prompt = prompt_of(3, 40)
    engine.add("a", prompt, SamplingParams(temperature=0, max_tokens=2))
    first = drain(engine)["a"]
    before = built.program.tokens_run
    engine.add("b", prompt, SamplingParams(temperature=0, max_tokens=2))
    second = drain(engine)["b"]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert built.program.tokens_run - before == 8 + 1
    assert second.outputs[0].token_ids == first.outputs[0].token_ids


def test_prompt_logprobs_of_every_token_though_the_prefix_is_cached():
    built = fake_built(max_logit_rows=7, max_num_seqs=4)
    engine = Engine(built)
    prompt = prompt_of(4, 40)
    engine.add("a", prompt, SamplingParams(temperature=0, max_tokens=2))
    drain(engine)
    engine.add("b", prompt, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3))
    scores = drain(engine)["b"].prompt_logprobs
    assert len(scores) == 40 and scores[0] is None
    for i in range(1, 40):
        raw = log_softmax(fake_logits(prompt[:i]))
        order = np.argsort(-raw, kind="stable")
        assert scores[i][prompt[i]].logprob == pytest.approx(raw[prompt[i]], abs=1e-5)
        assert scores[i][prompt[i]].rank == 1 + order.tolist().index(prompt[i])
        assert set(scores[i]) == {prompt[i], *order[:3].tolist()}


def test_logprobs_of_chosen_tokens():
    prompt = prompt_of(5, 9)
    out = one(fake_built(), prompt, temperature=0.9, seed=3, max_tokens=6, logprobs=2).outputs[0]
    ids, total = list(prompt), 0.0
    assert len(out.logprobs) == len(out.token_ids)
    for token, entry in zip(out.token_ids, out.logprobs, strict=True):
        raw = log_softmax(fake_logits(ids))
        assert entry[token].logprob == pytest.approx(raw[token], abs=1e-5)
        assert set(np.argsort(-raw, kind="stable")[:2].tolist()) <= set(entry)
        assert next(iter(entry)) == token
        total += raw[token]
        ids.append(token)
    assert out.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_without_logprobs_there_are_none():
    out = one(fake_built(), [1, 2], temperature=0, max_tokens=2).outputs[0]
    assert out.logprobs is None and out.cumulative_logprob is None


# -- how it ends ---------------------------------------------------------------------------------
def eos_at(prompt, k, limit=30):
    """The k-th greedy token, to be declared an end token."""
    return greedy(prompt, limit, None)[k]


def test_eos_stops_and_leaves_no_text():
    prompt = prompt_of(6, 5)
    end = eos_at(prompt, 4)
    want = greedy(prompt, 30, end)
    out = one(fake_built(eos=(end,)), prompt, temperature=0, max_tokens=30).outputs[0]
    assert out.token_ids == want and out.finish_reason == "stop" and out.stop_reason is None
    assert len(out.text) == len([t for t in want[:-1] if t < 95])


def test_ignore_eos_goes_on():
    prompt = prompt_of(6, 5)
    end = eos_at(prompt, 4)
    out = one(fake_built(eos=(end,)), prompt, temperature=0, max_tokens=9, ignore_eos=True)
    assert out.outputs[0].token_ids == greedy(prompt, 9, None)
    assert out.outputs[0].finish_reason == "length"


def test_stop_token_ids_say_which():
    prompt = prompt_of(8, 5)
    end = eos_at(prompt, 3)
    out = one(fake_built(), prompt, temperature=0, max_tokens=30, stop_token_ids=[end])
    assert out.outputs[0].stop_reason == end and out.outputs[0].token_ids == greedy(prompt, 30, end)


def test_min_tokens_holds_the_end_back():
    prompt = prompt_of(6, 5)
    end = eos_at(prompt, 0)
    out = one(fake_built(eos=(end,)), prompt, temperature=0, max_tokens=12, min_tokens=6)
    ids = out.outputs[0].token_ids
    assert len(ids) >= 6 and end not in ids[:6]


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(include):
    prompt = prompt_of(9, 6)
    text = "".join(chr(t + 32) for t in greedy(prompt, 12, None) if t < 95)
    stop = text[4:7]
    out = one(
        fake_built(eos=()), prompt, temperature=0, max_tokens=40, stop=["absent", stop],
        include_stop_str_in_output=include,
    ).outputs[0]  # fmt: skip
    at = text.index(stop)
    assert out.text == text[: at + (3 if include else 0)]
    assert out.finish_reason == "stop" and out.stop_reason == stop


def test_max_tokens_none_goes_to_the_models_length():
    prompt = prompt_of(10, 5)
    out = one(
        fake_built(max_model_len=48), prompt, temperature=0, max_tokens=None, ignore_eos=True
    )
    assert len(out.outputs[0].token_ids) == 43 and out.outputs[0].finish_reason == "length"


def test_detokenize_off():
    out = one(fake_built(), [1, 2], temperature=0, max_tokens=4, detokenize=False, ignore_eos=True)
    assert out.outputs[0].text == "" and len(out.outputs[0].token_ids) == 4


# -- n > 1 ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", ["paged", "contiguous"])
def test_n_completions_share_the_prompt(cache):
    built = fake_built(cache=cache)
    prompt = prompt_of(11, 33)
    out = one(built, prompt, temperature=1.0, seed=5, n=4, max_tokens=6, ignore_eos=True)
    assert [c.index for c in out.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in out.outputs}) == 4
    # The prompt once, its last token once more for each child, and then the outputs.
    assert built.program.tokens_run == 33 + 3 + 4 * 5
    single = one(fake_built(), prompt, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True)
    assert single.outputs[0].token_ids == out.outputs[0].token_ids


def test_more_completions_than_rows():
    prompt = prompt_of(12, 20)
    params = {"temperature": 1.0, "seed": 5, "n": 7, "max_tokens": 5, "ignore_eos": True}
    few = one(fake_built(max_num_seqs=2), prompt, **params)
    many = one(fake_built(max_num_seqs=8), prompt, **params)
    assert few.outputs == many.outputs and len(few.outputs) == 7


# -- seeds ---------------------------------------------------------------------------------------
def test_seeds():
    prompt = prompt_of(13, 8)
    ask = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    assert one(fake_built(), prompt, seed=1, **ask).outputs == one(
        fake_built(seed=9), prompt, seed=1, **ask
    ).outputs
    assert one(fake_built(), prompt, seed=-1, **ask).outputs  # any integer will do
    engine = Engine(fake_built())
    for name in "ab":
        engine.add(name, prompt, SamplingParams(**ask))
    done = drain(engine)
    assert done["a"].outputs[0].token_ids != done["b"].outputs[0].token_ids
    again = Engine(fake_built())
    for name in "ab":
        again.add(name, prompt, SamplingParams(**ask))
    assert drain(again)["b"].outputs == done["b"].outputs


# -- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        ("", "empty"),
        ([0, VOCAB], f"token id {VOCAB}"),
        ([-1], "token id -1"),
        ([1] * 64, "64 tokens; with max_model_len 64"),
        ({"text": "a"}, "'prompt'"),
        ([1.5], "integers"),
        (7, "a prompt is"),
        ({"prompt": 3}, "'prompt' must be a string"),
    ],
)
def test_bad_prompts_are_refused(prompt, words):
    engine = Engine(fake_built())
    with pytest.raises(RequestError, match=words) as error:
        engine.add("a", prompt, SamplingParams())
    assert "\n" not in str(error.value)
    assert not engine.has_unfinished
    engine.check_integrity()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"logprobs": 6}, "max_logprobs=5"),
        ({"stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
    ],
)
def test_bad_parameters_are_refused(params, words):
    with pytest.raises(RequestError, match=words):
        Engine(fake_built()).add("a", [1], SamplingParams(**params))


def test_a_prompt_that_no_cache_holds_is_refused():
    with pytest.raises(RequestError, match="the KV cache holds 32"):
        Engine(fake_built(num_blocks=2)).add("a", [1] * 40, SamplingParams())


def test_growing_past_the_cache_ends_with_length():
    out = one(fake_built(num_blocks=2), [1] * 30, temperature=0, max_tokens=20, ignore_eos=True)
    assert out.outputs[0].finish_reason == "length" and len(out.outputs[0].token_ids) == 2


# -- failures ------------------------------------------------------------------------------------
def run_with_a_bad_one(built, bad_params=None, bad_prompt=None):
    """Three good requests and a bad one; the good ones must not notice.  The bad one's output."""
    engine = Engine(built)
    prompts = [prompt_of(20 + i, 12 + i) for i in range(3)]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=8))
    bad_params = bad_params or SamplingParams(temperature=0, max_tokens=8)
    engine.add("bad", bad_prompt or prompt_of(50, 10), bad_params)
    done = drain(engine)
    for i, prompt in enumerate(prompts):
        assert done[str(i)].outputs[0].token_ids == greedy(prompt, 8)
    assert built.cache.num_free_blocks == built.cache.num_blocks
    engine.add("after", prompts[0], SamplingParams(temperature=0, max_tokens=8))
    assert drain(engine)["after"].outputs[0].token_ids == greedy(prompts[0], 8)
    return done["bad"]


def test_nan_logits_end_one_request():
    built = fake_built()
    bad = prompt_of(50, 10)
    built.program.logits = lambda history: (
        np.full(VOCAB, np.nan, np.float32)
        if list(history[:10]) == bad and len(history) >= 13
        else fake_logits(history)
    )
    out = run_with_a_bad_one(built)
    assert out.outputs[0].finish_reason == "error" and "not finite" in out.error
    assert out.outputs[0].token_ids == greedy(bad, 3)


class Raising(Decoder):
    name = "raising"

    def advance(self, seq, result, actions):
        if seq.num_output_tokens == 2:
            raise KeyError("lost")
        actions.append(seq, result.tokens)


class Lazy(Decoder):
    name = "lazy"

    def advance(self, seq, result, actions):
        pass


class Unplanned(Decoder):
    name = "unplanned"
    plans_steps = True

    def plan(self, seq, plan):
        raise RuntimeError("no plan")

    def advance(self, seq, result, actions):
        actions.append(seq, result.tokens)


class BadSampling(Decoder):
    name = "bad-sampling"

    def sampling(self, seq):
        raise RuntimeError("no parameters")

    def advance(self, seq, result, actions):
        actions.append(seq, result.tokens)


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (Raising, "decoder 'raising' failed: KeyError: 'lost'"),
        (Lazy, "neither appended"),
        (Unplanned, "no plan"),
        (BadSampling, "no parameters"),
    ],
)
def test_a_decoder_that_fails_ends_its_request(decoder, words):
    params = SamplingParams(temperature=0, max_tokens=8, decoder=decoder.name)
    out = run_with_a_bad_one(fake_built(decoders=[decoder]), params)
    assert out.outputs[0].finish_reason == "error" and words in out.error


def test_a_step_that_fails_ends_those_in_it():
    built = fake_built(max_num_seqs=2)
    engine = Engine(built)
    prompts = [prompt_of(30 + i, 6) for i in range(4)]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    engine.step()
    engine.step()

    def fail(batch):
        built.program.before = lambda batch: None
        raise ZeroDivisionError("in an op")

    built.program.before = fail
    done = drain(engine)
    for i in (0, 1):
        assert done[str(i)].outputs[0].finish_reason == "error"
        assert "ZeroDivisionError: in an op" in done[str(i)].error
        assert len(done[str(i)].outputs[0].token_ids) == 2
    for i in (2, 3):
        assert done[str(i)].outputs[0].token_ids == greedy(prompts[i], 6, None)
    assert built.cache.num_free_blocks == built.cache.num_blocks


class Nobody(Scheduler):
    name = "nobody"

    def schedule(self, step):
        pass


class Broken(Scheduler):
    name = "broken"

    def schedule(self, step):
        step.run(step.waiting[0])
        raise RuntimeError("oh")


@pytest.mark.parametrize(
    ("scheduler", "words"), [(Nobody, "put nobody into"), (Broken, "RuntimeError: oh")]
)
def test_a_scheduler_cannot_hang_the_engine(scheduler, words):
    built = fake_built(scheduler=scheduler())
    out = one(built, [1, 2, 3])
    assert out.outputs[0].finish_reason == "error" and words in out.error


class OneByOne(Scheduler):
    """Iterates over the live lists while it changes them, and puts everybody in twice."""

    name = "one-by-one"

    def schedule(self, step):
        for seq in step.running:
            step.run(seq)
            assert step.run(seq) == 0
        for seq in step.waiting:
            step.run(seq, max_tokens=3)
        if len(step.seqs) > 2:
            step.preempt(step.running[0])


def test_a_scheduler_may_change_what_it_iterates_over():
    built = fake_built(scheduler=OneByOne())
    engine = Engine(built)
    prompts = [prompt_of(60 + i, 9) for i in range(5)]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=7))
    done = drain(engine)
    for i, prompt in enumerate(prompts):
        assert done[str(i)].outputs[0].token_ids == greedy(prompt, 7)


def test_abort_frees_at_once():
    built = fake_built()
    engine = Engine(built)
    engine.add("a", prompt_of(1, 20), SamplingParams(max_tokens=30, ignore_eos=True, n=3))
    engine.add("b", prompt_of(2, 20), SamplingParams(max_tokens=30, ignore_eos=True))
    engine.abort("b")  # waiting
    for _ in range(4):
        engine.step()
    out = engine.abort("a")
    assert out.finished and [c.finish_reason for c in out.outputs] == ["abort"] * 3
    assert built.cache.num_free_blocks == built.cache.num_blocks
    assert engine.abort("a") is None and not engine.has_unfinished
    engine.check_integrity()
    assert engine.step() == []


def test_an_id_may_not_run_twice():
    engine = Engine(fake_built())
    engine.add("a", [1], SamplingParams())
    with pytest.raises(RequestError, match="'a'"):
        engine.add("a", [1], SamplingParams())


# -- drafts --------------------------------------------------------------------------------------
class Guess(Proposer):
    """Right for some tokens, then wrong: what greedy decoding would say, spoilt at one place."""

    name = "guess"
    seen: list

    def propose(self, seq, max_tokens):
        right = greedy(seq.token_ids, 4, None)
        spoil = random.Random(len(seq.token_ids)).randrange(6)
        guess = [(t + 1) % VOCAB if i == spoil else t for i, t in enumerate(right)]
        return (guess + [VOCAB + 3])[:max_tokens]  # the last one is no token at all

    def verified(self, seq, num_proposed, num_accepted):
        type(self).seen.append((num_proposed, num_accepted))


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0.7, "seed": 4}])
def test_drafts_change_nothing_but_the_number_of_steps(params):
    prompt = prompt_of(14, 13)
    ask = {"max_tokens": 29, "ignore_eos": True, "logprobs": 1, **params}
    plain = one(fake_built(), prompt, **ask)
    Guess.seen = []
    built = fake_built(proposer=Guess)
    engine = Engine(built)
    engine.add("a", prompt, SamplingParams(**ask))
    drafted = drain(engine)["a"]
    assert drafted.outputs == plain.outputs
    assert built.cache.num_free_blocks == built.cache.num_blocks
    if params["temperature"] == 0:
        assert engine.num_steps < 20
        assert any(accepted for _, accepted in Guess.seen)
    assert any(accepted < proposed for proposed, accepted in Guess.seen)


def test_drafts_in_a_crowd():
    Guess.seen = []
    built = fake_built(
        proposer=Guess, num_blocks=9, max_num_seqs=4, max_num_batched_tokens=9, max_logit_rows=6
    )
    engine = Engine(built)
    prompts = [prompt_of(70 + i, 14) for i in range(8)]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, SamplingParams(temperature=0, max_tokens=20, stop="zz"))
    done = drain(engine)
    for i, prompt in enumerate(prompts):
        assert done[str(i)].outputs[0].token_ids == greedy(prompt, 20)


class Contrary(Decoder):
    """Appends another token than was drawn."""

    name = "contrary"

    def advance(self, seq, result, actions):
        actions.append(seq, [(t + 1) % 90 for t in result.tokens])


def test_a_decoder_that_takes_other_tokens_than_the_drafts():
    prompt = prompt_of(15, 7)
    ask = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    Guess.seen = []
    ids = list(prompt)
    while len(ids) < 19:
        ids.append((greedy(ids, 1, None)[0] + 1) % 90)
    out = one(fake_built(decoders=[Contrary], decoder="contrary"), prompt, **ask)
    assert out.outputs[0].token_ids == ids[7:]
    engine = Engine(fake_built(decoders=[Contrary], decoder="contrary", proposer=Guess))
    engine.add("a", prompt, SamplingParams(**ask))
    out = drain(engine)["a"]
    ids = list(prompt)
    # With drafts several tokens are taken at once; each follows from what was drawn then.
    assert len(out.outputs[0].token_ids) == 12 and out.finished


# -- constraints ---------------------------------------------------------------------------------
class Rising(Constraint):
    """Each token is greater than the one before; the state is the list of tokens."""

    name = "rising"

    @classmethod
    def applies(cls, params):
        return bool(params.extra_args.get("rising"))

    def open(self, seq):
        return []

    def mask(self, state):
        allowed = np.zeros(VOCAB, bool)
        allowed[(state[-1] + 1 if state else 0) :] = True
        bits = np.zeros(-(-VOCAB // 32) * 32, np.uint8)
        bits[:VOCAB] = allowed
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, state, token_id):
        assert not state or token_id > state[-1]
        state.append(token_id)

    def rollback(self, state, num_tokens):
        del state[len(state) - num_tokens :]

    def fork(self, state):
        return list(state)


def rising_greedy(prompt, num):
    ids = list(prompt)
    out = []
    while len(out) < num and (not out or out[-1] < VOCAB - 1):
        logits = fake_logits(ids)
        logits[: out[-1] + 1 if out else 0] = -np.inf
        out.append(int(logits.argmax()))
        ids.append(out[-1])
    return out


@pytest.mark.parametrize("proposer", [None, Guess])
def test_constraint_masks_every_token(proposer):
    Guess.seen = []
    prompt = prompt_of(16, 10)
    built = fake_built(constraints=[Rising], proposer=proposer, eos=())
    ask = {"temperature": 0, "max_tokens": 8, "extra_args": {"rising": True}}
    out = one(built, prompt, **ask)
    want = rising_greedy(prompt, 8)
    assert out.outputs[0].token_ids == want


def test_constraint_with_forks_and_nothing_left():
    prompt = prompt_of(17, 10)
    built = fake_built(constraints=[Rising], eos=())
    ask = {"temperature": 3.0, "seed": 2, "n": 4, "max_tokens": 60, "extra_args": {"rising": True}}
    out = one(built, prompt, **ask)
    assert out.error is not None and "no token is allowed" in out.error
    for completion in out.outputs:
        assert completion.token_ids == sorted(set(completion.token_ids))
        assert completion.finish_reason == "error"


# -- decoders that fork --------------------------------------------------------------------------
class TwoBest(Decoder):
    """Forks at the first token and follows the two best, greedily; drops the worse at the end."""

    name = "two-best"

    def sampling(self, seq):
        return {"num_logprobs": 2}

    def advance(self, seq, result, actions):
        assert result.num_rows == 1
        if seq.num_output_tokens == 0 and len(seq.request.sequences) == 1:
            other = actions.fork(seq)
            actions.append(other, [result.top(0)[1][0]])
        actions.append(seq, [result.top(0)[0][0]])


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_decoder_that_forks(rows, logprobs):
    prompt = prompt_of(18, 21)
    built = fake_built(decoders=[TwoBest], decoder="two-best", eos=(), max_num_seqs=rows)
    engine = Engine(built)
    engine.add("a", prompt, SamplingParams(temperature=0, max_tokens=5, logprobs=logprobs))
    out = drain(engine)["a"]
    first, second = np.argsort(-fake_logits(prompt), kind="stable")[:2].tolist()
    assert out.outputs[0].token_ids == greedy(prompt, 5, None)
    assert out.outputs[1].token_ids == [second, *greedy([*prompt, second], 4, None)]
    if logprobs:
        assert {first, second} == set(out.outputs[0].logprobs[0])
        assert {first, second} == set(out.outputs[1].logprobs[0])


def test_streaming_holds_back_what_may_become_a_stop_string():
    from pyllmlite.engine.outputs import request_output

    prompt = prompt_of(9, 6)
    text = "".join(chr(t + 32) for t in greedy(prompt, 12, None) if t < 95)
    stop = text[4:9]
    engine = Engine(fake_built(eos=()))
    engine.add("a", prompt, SamplingParams(temperature=0, max_tokens=40, stop=stop), stream=True)
    seen = []
    while engine.has_unfinished:
        seen += [request_output(state).outputs[0].text for state in engine.step()]
    assert all(text[:4].startswith(s) for s in seen) and seen[-1] == text[:4]
    assert EOS == VOCAB - 1
