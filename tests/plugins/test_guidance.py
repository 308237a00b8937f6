"""``guidance``: what comes out fits what was asked, alone and together with drafts and ``n``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from text_model import write_text_model

from pyllmlite import LLM, SamplingParams, StructuredOutputsParams
from pyllmlite.core.errors import RequestError
from pyllmlite.core.request import Request, Sequence
from pyllmlite.hooks.decoder import DecoderContext
from pyllmlite.model.tokenizer import Tokenizer
from pyllmlite.testing import ConstraintConformance
from pyllmlite_plugins.decoder.guidance import Guidance

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "d"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def check_json(text):
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags"]
    assert isinstance(value["name"], str) and len(value["name"]) <= 6
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 150
    assert len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "bc", "d"}


def check_grammar(text):
    assert re.fullmatch("x(-[0-9]{1,3})*;", text)


KINDS = {
    "json": ({"json": SCHEMA}, check_json),
    "json without whitespace": (
        {"json": json.dumps(SCHEMA), "disable_any_whitespace": True},
        lambda text: (check_json(text), re.fullmatch(r'(\S|"[^"]*")*', text)[0]),
    ),
    "regex": (
        {"regex": "[0-9]{3}-(ab|c){1,4}"},
        lambda text: re.fullmatch("[0-9]{3}-(ab|c){1,4}", text)[0],
    ),
    "choice": ({"choice": ["yes", 'a "no"', "yés"]}, ["yes", 'a "no"', "yés"].index),
    "lark": ({"grammar": 'start: "x" ("-" /[0-9]{1,3}/)~0..9 ";"'}, check_grammar),
    "gbnf": (
        {"grammar": 'root ::= "x" n n? ";"\nn ::= "-" [0-9] [0-9]?'},
        check_grammar,
    ),
}


# -- the contract --------------------------------------------------------------------------------
class Small(ConstraintConformance):
    """Fifty tokens: the end token and single characters."""

    strategy = Guidance

    def context(self):
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789{}[]\":,.-+ _"))
        vocab = {"<e>": 0} | {c if c != " " else "Ġ": i + 1 for i, c in enumerate(letters)}
        backend = Backend(models.BPE(vocab, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken("<e>", special=True)])
        return DecoderContext(50, 256, (0,), Tokenizer(backend, eos_token_ids=(0,)))


class TestJson(Small):
    params = {"structured_outputs": {"json": SCHEMA}}


class TestRegex(Small):
    params = {"structured_outputs": {"regex": "[a-c]+[0-9]{2,}"}}


class TestShortRegex(Small):
    """Complete, with nothing behind it, within the suite's eight tokens."""

    params = {"structured_outputs": {"regex": "[a-c]{3}"}}


class TestGrammar(Small):
    params = {"structured_outputs": {"grammar": 'start: "a" ("b" | start)+'}}


def test_end_tokens_are_taken_back():
    """Drafts may hold end tokens, and tokens behind them."""
    guidance = Guidance(Small().context())
    params = SamplingParams(structured_outputs={"regex": "ab?"})
    state = guidance.open(Sequence(0, Request("0", [1], params), [1]))
    a, b = (guidance.context.tokenizer.token_id(letter) for letter in "ab")
    masks = [guidance.mask(state).copy()]
    accepted = [a, b, 0, 0, 0]
    for token in accepted:
        guidance.accept(state, token)
        masks.append(guidance.mask(state).copy())
    assert [int(mask[0]) for mask in masks[2:]] == [1] * 4  # the end token alone
    for back in (1, 2, 3, 5, 4):
        guidance.rollback(state, back)
        assert (guidance.mask(state) == masks[5 - back]).all()
        for token in accepted[5 - back :]:
            guidance.accept(state, token)
    with pytest.raises(RuntimeError, match="parser stopped"):
        guidance.accept(state, a)


def test_masks_computed_together():
    """As one by one; one that is not asked for is no other's later."""
    guidance = Guidance(Small().context())
    states = []
    for i, regex in enumerate(("ab?", "[a-c]+", "b{2}", "[0-9]")):
        params = SamplingParams(structured_outputs={"regex": regex})
        states.append(guidance.open(Sequence(i, Request("0", [1], params), [1])))
    alone = [guidance.mask(guidance.fork(state)).copy() for state in states]
    for together in (states, states[:1], states[2:], states[::-1], []):
        guidance.prepare(together)
        for state, want in zip(states, alone, strict=True):
            assert (guidance.mask(state) == want).all()


# -- in the engine -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_text_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, dtype="f32", max_num_seqs=16)


@pytest.fixture(scope="module")
def drafting(path):
    return LLM(
        path, dtype="f32", max_num_seqs=16, proposer="prompt-lookup",
        extra={"draft_token_cost": 0.01, "prompt_lookup_min": 1},
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_fits(llm, drafting, kind):
    words, check = KINDS[kind]
    prompt = 'Say {"name": "b", "age": 12, "tags": ["a", "bc"]} or 123-abab, x-12-1; yes:'
    params = SamplingParams(n=8, seed=4, max_tokens=400, structured_outputs=words)
    outputs = [one.generate([prompt] * 3, params, use_tqdm=False) for one in (llm, drafting)]
    for plain, drafted in zip(*outputs, strict=True):
        assert plain.error is None and drafted.outputs == plain.outputs
        for completion in plain.outputs:
            assert completion.finish_reason == "stop"
            check(completion.text)
    assert len({c.text for c in outputs[0][0].outputs}) > 1
    for one in (llm, drafting):
        one.engine.check_integrity()


@pytest.mark.parametrize("kind", ["json", "regex", "choice"])
def test_beams_fit_too(llm, kind):
    words, check = KINDS[kind]
    params = SamplingParams(
        decoder="beam", n=3, max_tokens=400, structured_outputs=words,
        extra_args={"beam_width": 3, "early_stopping": True},
    )  # fmt: skip
    (output,) = llm.generate(["A"], params, use_tqdm=False)
    assert output.error is None
    texts = [completion.text for completion in output.outputs]
    assert len(set(texts)) == len(texts) == 3
    for text in texts:
        check(text)
    llm.engine.check_integrity()


def test_greedy_and_others_beside(llm):
    words, check = KINDS["json"]
    asked = SamplingParams(temperature=0, max_tokens=400, structured_outputs=words)
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate(["A", "A"], [asked, plain], use_tqdm=False)
    check(outputs[0].outputs[0].text)
    assert outputs[1].outputs == llm.generate(["A"], plain, use_tqdm=False)[0].outputs


def test_grammars_are_compiled_once(llm):
    (guidance,) = llm.built.constraints
    for _ in range(2):
        params = SamplingParams(max_tokens=3, structured_outputs={"regex": "unseen[0-9]"})
        before = len(guidance._compiled)
        llm.generate(["A"] * 3, params, use_tqdm=False)
    assert len(guidance._compiled) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"json": {"type": "nosuch"}}, "json: Invalid type: nosuch"),
        ({"regex": "(a"}, "regex: .*invalid regex"),
        ({"grammar": "start: nosuch"}, 'grammar: .*unknown name: "nosuch"'),
        ({"json": "{"}, "the schema is not JSON"),
        ({"json": "[]"}, "a JSON schema is an object"),
        ({"choice": []}, "takes one of|choice must be"),
        ({"choice": "yes"}, "choice must be a list"),
        ({"regex": ""}, "regex must be a text"),
        ({"regex": "a", "choice": ["a"]}, "got regex and choice"),
        ({}, "got none"),
        ({"jason": {}}, "does not know 'jason'"),
    ],
)
def test_what_cannot_work_is_refused(llm, words, message):
    with pytest.raises(RequestError, match=message) as raised:
        llm.generate(["A"], SamplingParams(structured_outputs=words), use_tqdm=False)
    assert "\n" not in str(raised.value)


def test_rules_that_lead_to_rules(llm):
    """Followed by recursion, which must not end the process."""
    rules = [f"r{i}: r{i + 1}" for i in range(3000)]
    grammar = "\n".join(["start: r0", *rules, 'r3000: "yes"'])
    params = SamplingParams(max_tokens=20, structured_outputs={"grammar": grammar})
    assert llm.generate(["A"], params, use_tqdm=False)[0].outputs[0].text == "yes"


def test_too_much_grammar(llm):
    words = {"choice": [f"word {i}" for i in range(20_000)]}
    with pytest.raises(RequestError, match="at most 131072"):
        llm.generate(["A"], SamplingParams(structured_outputs=words), use_tqdm=False)


def test_choices_of_odd_characters(llm):
    for text in ('a"b', "\x7f", "\t", "\\n", "äö\u2028"):
        params = SamplingParams(max_tokens=40, structured_outputs={"choice": [text]})
        assert llm.generate(["A"], params, use_tqdm=False)[0].outputs[0].text == text


def test_refused_with_others(llm, path, monkeypatch):
    asked = StructuredOutputsParams(regex="a+")
    for words, message in (
        ({"ignore_eos": True}, "no ignore_eos"),
        ({"min_tokens": 2}, "no min_tokens"),
    ):
        with pytest.raises(RequestError, match=message):
            params = SamplingParams(structured_outputs=asked, **words)
            llm.generate(["A"], params, use_tqdm=False)
    with pytest.raises(RequestError, match="must be StructuredOutputsParams or a dict"):
        SamplingParams(structured_outputs="a+")
    params = SamplingParams(structured_outputs=asked, detokenize=False)
    without = LLM(path, dtype="f32", skip_tokenizer_init=True)
    with pytest.raises(RequestError, match="needs the model's tokenizer"):
        without.generate([[5]], params, use_tqdm=False)
    monkeypatch.setattr(without.built, "constraints", [])
    with pytest.raises(RequestError, match="no constraint plugin"):
        without.generate([[5]], params, use_tqdm=False)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'pyllmlite\[structured\]'"):
        llm.generate(["A"], params, use_tqdm=False)


def test_closed_objects(llm):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {"enum": [1]}}}},
        "required": ["a"],
    }
    params = SamplingParams(
        n=6, seed=2, max_tokens=300,
        structured_outputs={"json": schema, "disable_additional_properties": True},
    )  # fmt: skip
    for completion in llm.generate(["A"], params, use_tqdm=False)[0].outputs:
        assert json.loads(completion.text) in ({"a": {}}, {"a": {"b": 1}})
