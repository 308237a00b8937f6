"""Strategies that raise, answer nonsense or never get on: their request ends with one line that
names them, and nobody else notices."""

import math
import types

import numpy as np
import pytest
from text_model import write_text_model

from pyllmlite.core.errors import ConfigError, PluginError, RequestError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.llm import LLM
from pyllmlite.hooks import registry as registry_module
from pyllmlite.hooks.decoder import Constraint, Decoder, Proposer
from pyllmlite.hooks.registry import Registry
from pyllmlite.hooks.scheduler import Scheduler
from pyllmlite.hooks.specs import hookimpl
from pyllmlite_plugins.cache.paged import Paged
from pyllmlite_plugins.scheduler.continuous import Continuous

VOCAB = 259
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_text_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def load(model):
    """An ``LLM`` with strategies as an installed plugin would bring them."""
    registry_module._load.cache_clear()

    def make(hook, *classes, **options):
        module = types.ModuleType("misbehaving")
        setattr(module, f"pyllmlite_{hook}", hookimpl(lambda: classes))
        Registry.load().register(module, distribution="misbehaving")
        assert not Registry.load().problems
        return LLM(model, max_model_len=64, max_num_seqs=4, threads=1, dtype="f32", **options)

    yield make
    registry_module._load.cache_clear()


def boom(*_):
    raise OSError("no luck")


def late(bad):
    """Two tokens, then ``bad``."""

    def advance(self, seq, result, actions):
        bad(seq, actions) if seq.num_output_tokens == 2 else actions.append(seq, result.tokens)

    return advance


def wish(method, *args):
    return {"plans_steps": True, "plan": lambda self, seq, plan: getattr(plan, method)(*args)}


def words(*shape, dtype=np.uint32):
    return np.zeros(shape, dtype)


class Append(Decoder):
    name = "bad"

    def advance(self, seq, result, actions):
        actions.append(seq, result.tokens)


DECODERS = {
    "far token": ({"advance": late(lambda s, a: a.append(s, [10**6]))}, "1000000 is not in"),
    "huge token": ({"advance": late(lambda s, a: a.append(s, [2**70]))}, "is not in"),
    "negative token": ({"advance": late(lambda s, a: a.append(s, [-1]))}, "-1 is not in"),
    "token in a list": ({"advance": late(lambda s, a: a.append(s, [5, -1]))}, "-1 is not in"),
    "no token": ({"advance": late(lambda s, a: a.append(s, ["x"]))}, "'x' is not an integer"),
    "fork of the dead": (
        {"advance": late(lambda s, a: (a.end(s, "stop"), a.fork(s)))},
        "cannot be forked",
    ),
    "nothing left": ({"advance": late(lambda s, a: a.end(s, "dropped"))}, "cannot be dropped"),
    "no reason": ({"advance": late(lambda s, a: a.end(s, None))}, "the reason of an end"),
    "sampling raises": ({"sampling": boom}, "OSError: no luck"),
    "unknown sampling": ({"sampling": lambda *_: {"temprature": 1}}, "names temprature; known"),
    "plan raises": ({"plans_steps": True, "plan": boom}, "OSError: no luck"),
    "short mask": (wish("mask", 0, words(2)), r"uint32 \[9\].*got uint32 \[2\]"),
    "square mask": (wish("mask", 0, words(1, 9)), r"uint32 \[9\].*got uint32 \[1, 9\]"),
    "mask of bytes": (wish("mask", 0, words(9, dtype=bool)), r"uint32 \[9\].*got bool \[9\]"),
    "mask of a neighbour": (wish("mask", 1, words(9)), r"row 1 is not in \[0, 1\)"),
    "mask before": (wish("mask", -1, words(9)), r"row -1 is not in \[0, 1\)"),
    "logits of a neighbour": (wish("want_logits", 1), r"row 1 is not in \[0, 1\)"),
    "bias up": (wish("bias", [3], [math.inf]), "-inf to forbid"),
    "bias nan": (wish("bias", [3], [math.nan]), "-inf to forbid"),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_hurts_its_own_request_only(load, name):
    methods, why = DECODERS[name]
    llm = load("decoders", type("Bad", (Append,), methods))
    plain, bad = SamplingParams(**GREEDY), SamplingParams(**GREEDY, decoder="bad")
    alone = llm.generate(["one", "two"], plain, use_tqdm=False)
    for _ in range(2):
        one, two, three = llm.generate(["one", "xyz", "two"], [plain, bad, plain], use_tqdm=False)
        assert [o.outputs[0].token_ids for o in (one, three)] == [
            o.outputs[0].token_ids for o in alone
        ]
        assert one.error is None and three.error is None
        with pytest.raises(AssertionError, match=f"^decoder 'bad' failed: .*{why}"):
            raise AssertionError(two.error)
        assert "\n" not in two.error
        llm.engine.check_integrity()
        assert not llm.engine.requests
        assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


def check_neighbours(llm, bad, why):
    plain = SamplingParams(**GREEDY)
    (alone,) = llm.generate("one", plain, use_tqdm=False)
    one, two = llm.generate(["one", "xyz"], [plain, bad], use_tqdm=False)
    assert one.outputs[0].token_ids == alone.outputs[0].token_ids and one.error is None
    assert two.error is not None and why in two.error
    llm.engine.check_integrity()
    assert not llm.engine.requests
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


@pytest.mark.parametrize("method", ["fork", "sampling"])
def test_a_birth_that_fails(load, method):
    def raises(self, *seqs):
        return {} if seqs[-1].child == 0 else boom()

    llm = load("decoders", type("Bad", (Append,), {method: raises}))
    bad = SamplingParams(n=3, max_tokens=5, decoder="bad")
    check_neighbours(llm, bad, "starting the other completions failed: OSError: no luck")


def test_a_sequence_that_is_left_behind(load):
    """Its brother has gone on and ended; nobody will ever choose a token for it."""

    class Idle(Append):
        def advance(self, seq, result, actions):
            if seq.child == 0:
                if len(seq.request.sequences) == 1:
                    actions.fork(seq)
                actions.append(seq, result.tokens)

    llm = load("decoders", Idle)
    bad = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, decoder="bad")
    check_neighbours(llm, bad, "decoder 'bad' neither appended a token nor ended a sequence")


def test_a_stop_of_the_decoders_own_has_its_text(load):
    llm = load(
        "decoders", type("Ends", (Append,), {"advance": late(lambda s, a: a.end(s, "stop", "why"))})
    )
    params = SamplingParams(**GREEDY, decoder="bad", logit_bias={33: 100})
    (output,) = llm.generate("abc", params, use_tqdm=False)
    assert output.outputs[0].text == "BB" and output.outputs[0].stop_reason == "why"


def test_more_tokens_than_were_drawn_have_no_logprobs_of_a_neighbour(load):
    class More(Append):
        def advance(self, seq, result, actions):
            actions.append(seq, [*result.tokens, 7])

    llm = load("decoders", More)
    params = SamplingParams(**GREEDY, decoder="bad", logprobs=2)
    for output in llm.generate(["one", "two"], params, use_tqdm=False):
        completion = output.outputs[0]
        assert output.error is None and len(completion.logprobs) == 12
        for token, found in zip(completion.token_ids[::2], completion.logprobs[::2], strict=True):
            assert len(found) == 2 and found[token].rank == 1
        for found in completion.logprobs[1::2]:
            assert list(found) == [7] and math.isnan(found[7].logprob)


def test_a_bias_forbids(load):
    class Only(Append):
        plans_steps = True

        def plan(self, seq, plan):
            allowed = seq.request.params.extra_args["allowed"]
            ids = [i for i in range(VOCAB) if i not in allowed]
            plan.bias(ids, [-math.inf] * len(ids))

    llm = load("decoders", Only)
    for temperature in (0, 1):
        params = SamplingParams(
            temperature=temperature, top_p=0.9, decoder="bad", extra_args={"allowed": [40, 50]},
            presence_penalty=1, repetition_penalty=1.3,
        )  # fmt: skip
        (output,) = llm.generate("abc", params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 16
        assert set(output.outputs[0].token_ids) <= {40, 50}
    nothing = SamplingParams(decoder="bad", extra_args={"allowed": []})
    check_neighbours(llm, nothing, "no token is allowed")


def test_a_request_that_cannot_be_opened(load):
    llm = load("decoders", type("Bad", (Append,), {"open": boom}))
    with pytest.raises(RequestError, match="decoder 'bad' failed: OSError: no luck"):
        llm.generate("abc", SamplingParams(decoder="bad"), use_tqdm=False)
    llm.engine.check_integrity()


@pytest.mark.parametrize("method", ["propose", "verified"])
def test_a_proposer_that_raises_is_named(load, method):
    class Bad(Proposer):
        name = "bad"

        def propose(self, seq, max_tokens):
            return [7] if seq.request.prompt == "xyz" else []

        def verified(self, seq, num_proposed, num_accepted):
            pass

    def raises(self, seq, *_):
        return boom() if seq.request.prompt == "xyz" else []

    setattr(Bad, method, raises)
    llm = load("decoders", Bad, proposer="bad")
    check_neighbours(llm, SamplingParams(**GREEDY), "proposer 'bad' failed: OSError: no luck")


def test_a_proposal_without_end_is_cut(load):
    class Endless(Proposer):
        name = "endless"

        def propose(self, seq, max_tokens):
            while True:
                yield 7

    llm = load("decoders", Endless, proposer="endless")
    (output,) = llm.generate("abc", SamplingParams(**GREEDY), use_tqdm=False)
    assert output.error is None and len(output.outputs[0].token_ids) == 12


def test_a_constraint_with_a_wrong_mask(load):
    class Wrong(Constraint):
        name = "wrong"

        @classmethod
        def applies(cls, params):
            return "wrong" in params.extra_args

        def open(self, seq):
            return None

        def mask(self, state):
            return words(3)

        def accept(self, state, token_id):
            pass

        def rollback(self, state, num_tokens):
            pass

        def fork(self, state):
            return None

    llm = load("decoders", Wrong)
    bad = SamplingParams(**GREEDY, extra_args={"wrong": 1})
    check_neighbours(llm, bad, "constraint 'wrong' failed: ValueError: a mask is uint32 [9]")


def test_a_prepare_that_raises_is_named(load):
    """It fails those that it was called for, and nobody else."""

    class Bad(Proposer):
        name = "bad"

        def prepare(self, seqs, max_tokens):
            boom()

        def propose(self, seq, max_tokens):
            return []

    class Mask(Constraint):
        name = "bad-mask"

        @classmethod
        def applies(cls, params):
            return "mask" in params.extra_args

        def prepare(self, states):
            boom()

    for name in ("open", "mask", "accept", "rollback", "fork"):
        setattr(Mask, name, lambda self, *_: None)
    Mask.__abstractmethods__ = frozenset()
    llm = load("decoders", Bad, Mask)
    plain = SamplingParams(**GREEDY)
    (alone,) = llm.generate("one", plain, use_tqdm=False)
    for ask, line in (
        ({"proposer": "bad"}, "proposer 'bad' failed: OSError: no luck"),
        ({"extra_args": {"mask": 1}}, "constraint 'bad-mask' failed: OSError: no luck"),
    ):
        bad = SamplingParams(**GREEDY, **ask)
        outputs = llm.generate(["one", "xyz", "abc"], [plain, bad, bad], use_tqdm=False)
        assert outputs[0].outputs == alone.outputs
        assert [output.error for output in outputs] == [None, line, line]
        llm.engine.check_integrity()


@pytest.mark.parametrize(
    ("method", "answer", "why"),
    [
        ("acquire", boom, "OSError: no luck"),
        ("reserve", boom, "OSError: no luck"),
        ("acquire", -5, "acquire answered -5 of 3 tokens"),
        ("acquire", 3, "acquire answered 3 of 3 tokens"),
        ("acquire", "x", "TypeError"),
    ],
)
def test_a_cache_that_cannot_start_a_sequence_is_named(load, method, answer, why):
    class Bad(Paged):
        name = "bad"
        broken = False

    def second(self, seq_id, *args):
        known = getattr(Paged, method)(self, seq_id, *args)
        if not self.broken or seq_id % 2:
            return known
        return answer() if callable(answer) else answer

    setattr(Bad, method, second)
    llm = load("caches", Bad, cache="bad", enable_prefix_caching=False)
    plain = SamplingParams(**GREEDY)
    (alone,) = llm.generate("one", plain, use_tqdm=False)
    llm.engine.actions._next_id += llm.engine.actions._next_id % 2
    llm.built.cache.broken = True
    one, two = llm.generate(["one", "xyz"], plain, use_tqdm=False)
    assert one.error is None and one.outputs[0].token_ids == alone.outputs[0].token_ids
    assert two.error.startswith("cache 'bad' failed: ") and why in two.error
    llm.engine.check_integrity()
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


def test_an_empty_step_counts_for_those_who_wait_in_it(load):
    class Lazy(Continuous):
        name = "bad"
        idle = 9

        def schedule(self, step):
            self.idle -= 1
            if self.idle < 0:
                super().schedule(step)

    llm = load("schedulers", Lazy, scheduler="bad")
    for idle, ends in ((9, "error"), (2, "length"), (2, "length")):
        llm.built.scheduler.idle = idle
        (output,) = llm.generate("abc", SamplingParams(**GREEDY), use_tqdm=False)
        assert output.outputs[0].finish_reason == ends


def test_a_priority_that_cannot_be_compared(load):
    llm = load("decoders", Append)
    for priority in ("x", None, math.nan):
        with pytest.raises(RequestError, match="priority must be a number"):
            llm.generate(["a", "b"], use_tqdm=False, priority=[1, priority])
    assert not llm.engine.requests


@pytest.mark.parametrize(
    ("hook", "base", "option"),
    [
        ("schedulers", Continuous, {"scheduler": "bad"}),
        ("caches", Paged, {"cache": "bad"}),
        ("decoders", Append, {"decoder": "bad"}),
        ("decoders", Constraint, {}),
    ],
)
def test_a_strategy_that_cannot_be_made(load, hook, base, option):
    methods = dict.fromkeys(base.__abstractmethods__, boom) | {"name": "bad", "__init__": boom}
    with pytest.raises(PluginError, match="^[a-z]+ 'bad' cannot be set up: OSError: no luck$"):
        load(hook, type("Bad", (base,), methods), **option)


def test_a_constraint_that_does_not_know_whether_it_applies(load):
    methods = dict.fromkeys(Constraint.__abstractmethods__, boom)
    llm = load("decoders", type("Bad", (Constraint,), methods | {"name": "bad", "applies": boom}))
    with pytest.raises(RequestError, match="constraint 'bad' failed: OSError"):
        llm.generate("abc", use_tqdm=False)


def test_options_that_no_strategy_reads(load, model):
    class Reads(Paged):
        name = "bad"
        priority = -1

        def __init__(self, needs):
            super().__init__(needs)
            assert needs.extra.get("page_colour", "red") in ("red", "blue")

    assert load("caches", Reads, cache="bad", extra={"page_colour": "blue"})
    with pytest.raises(ConfigError, match="reads extra.'page_color'.; did you mean 'page_colour'"):
        LLM(model, cache="bad", extra={"page_color": "blue"})
    with pytest.raises(ConfigError, match="no chosen strategy reads extra.'page_colour'.; read"):
        LLM(model, extra={"page_colour": "blue"})
    with pytest.raises(ConfigError, match="extra is a dict"):
        LLM(model, extra=[1])
    with pytest.raises(PluginError, match="'none'.*no group_size"):
        LLM(model, quantizer="none", group_size=32)
    with pytest.raises(ConfigError, match="max_logprobs 300 is more than the vocabulary's 259"):
        LLM(model, max_logprobs=300)


class Restless(Scheduler):
    """Throws out whoever runs before a prompt is done."""

    name = "bad"

    def schedule(self, step):
        for seq in step.running:
            step.preempt(seq)
        for seq in step.waiting:
            step.run(seq, max_tokens=2)


class Never(Scheduler):
    name = "bad"
    event: object = None

    def schedule(self, step):
        pass

    def next_event(self, now):
        return boom() if self.event == "raise" else self.event


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Restless, "times, nobody got on"),
        (type("Past", (Never,), {"event": 0.0}), "put nobody into 3 steps in a row"),
        (type("NaN", (Never,), {"event": math.nan}), "put nobody into 3 steps in a row"),
        (type("Forever", (Never,), {"event": math.inf}), "put nobody into 3 steps in a row"),
        (type("Raises", (Never,), {"event": "raise"}), "failed: OSError: no luck"),
        (type("Word", (Never,), {"event": "soon"}), "failed: TypeError"),
    ],
)
def test_a_scheduler_cannot_hang_the_engine(load, cls, why):
    llm = load("schedulers", cls, scheduler="bad", enable_prefix_caching=False)
    outputs = llm.generate(["hello", "world"], SamplingParams(**GREEDY), use_tqdm=False)
    for output in outputs:
        assert output.error.startswith("scheduler 'bad'") and why in output.error
    llm.engine.check_integrity()
    assert not llm.engine.requests
    assert llm.built.cache.num_free_blocks == llm.built.cache.num_blocks


def test_preemptions_that_let_somebody_on_go_on(load):
    class Mean(Continuous):
        name = "bad"

        def schedule(self, step):
            for seq in list(step.running)[1:]:
                step.preempt(seq)
            super().schedule(step)

    llm = load("schedulers", Mean, scheduler="bad", enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    outputs = llm.generate([[40 + i] * 5 for i in range(9)], params, use_tqdm=False)
    assert all(o.error is None and len(o.outputs[0].token_ids) == 50 for o in outputs)
