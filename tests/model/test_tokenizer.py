"""Tokenizers against transformers' own, over every kind of text."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pyllmlite.core.errors import ModelError, RequestError
from pyllmlite.model import hub
from pyllmlite.model.gguf_tokenizer import build_backend, byte_alphabet, derived_merges
from pyllmlite.model.source import open_checkpoint
from pyllmlite.model.tokenizer import Tokenizer, open_tokenizer

PIECES = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n",
    "hello", " world", "Straße", "naïve", "é", "e\u0301", "ﬁ", "你好", "こんにちは", "العربية",
    "עברית", "हिन्दी", "👩‍👩‍👧", "🇩🇪", "👍🏽", "\u200d", "\u00a0",
    "\u2028", "\ufeff", "\x00", "\x7f", "12", "3",
    "٣", "½", "...", "'s", "don't", "I'LL", "<", "|", ">", "def f(x):", "  return x", "\\", "`",
]  # fmt: skip


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def piece() -> str:
        if rng.random() < 0.6:
            return rng.choice(PIECES)
        low, high = rng.choice([(32, 126), (160, 0x2FFF), (0x3000, 0xD7FF), (0x10000, 0x1FFFF)])
        return chr(rng.randint(low, high))

    return ["".join(piece() for _ in range(rng.randint(0, 14))) for _ in range(count)]


def digits_matter(text: str) -> bool:
    """Whether "every digit a piece of its own" can change the tokens: it takes the last of several
    spaces away from a digit, and a space or a neighbour from a number's sign of several bytes."""
    triples = zip(text, text[1:], text[2:], strict=False)
    return any(c.isnumeric() and not c.isascii() for c in text) or any(
        a.isspace() and b.isspace() and c.isnumeric() for a, b, c in triples
    )


@pytest.fixture(scope="module")
def smollm():
    return hub.resolve(None, progress=False)


@pytest.fixture(scope="module")
def gguf_pair(smollm):
    """Our tokenizer of SmolLM2's GGUF, and transformers'."""
    if smollm.suffix != ".gguf":
        pytest.skip("the default model was fetched as safetensors")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm.parent, gguf_file=smollm.name)
    return open_tokenizer(smollm), theirs


def test_smollm_equals_transformers_on_random_texts(gguf_pair):
    """transformers leaves out the vocabulary's own pre-tokenizer (every digit a piece of its own,
    which the GGUF states as ``smollm``), so texts to which it matters are compared with the
    pre-tokenizer put in."""
    from tokenizers import pre_tokenizers

    ours, theirs = gguf_pair
    texts = random_texts(10_000, seed=1)
    found = ours.encode_batch(texts)
    assert [ours.encode(t) for t in texts[:50]] == found[:50]
    plain = [i for i, text in enumerate(texts) if not digits_matter(text)]
    assert len(plain) > 4000
    backend = theirs.backend_tokenizer
    expected = [e.ids for e in backend.encode_batch([texts[i] for i in plain])]
    assert [found[i] for i in plain] == expected
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    assert [e.ids for e in backend.encode_batch(texts)] == found
    for ids in found:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False)


def test_decode_of_random_ids(gguf_pair):
    ours, theirs = gguf_pair
    rng = np.random.default_rng(3)
    for _ in range(500):
        ids = rng.integers(0, ours.vocab_size, size=rng.integers(0, 9)).tolist()
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(198) == ours.decode([198]) == theirs.decode([198])


def test_smollm_facts(gguf_pair):
    ours, theirs = gguf_pair
    assert ours.vocab_size == len(ours) == len(theirs) == 49152
    assert ours.eos_token_ids == (2,) and ours.eos_token_id == 2 and ours.bos_token_id == 1
    assert ours.token(2) == "<|im_end|>" and ours.token_id("<|im_end|>") == 2
    assert sorted(ours.all_special_ids) == list(range(17))
    assert ours.encode("") == [] and ours.decode([]) == ""


CHATS = [
    [{"role": "user", "content": "Hi <b>&\"'"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": ""},
    ],
]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [False, True])
def test_chat_template_equals_transformers(gguf_pair, chat, prompt):
    ours, theirs = gguf_pair
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == expected


TEMPLATE = """{%- if tools %}{{ tools | tojson(indent=2) }}
{% endif %}
{%- for m in messages %}
    {%- if m.role == 'bad' %}{{ raise_exception('no bad role') }}{% endif %}
    {%- if m.skip is defined and m.skip %}{% continue %}{% endif %}
{{ bos_token }}{{ m.role }}: {% generation %}{{ m.content | trim }}{% endgeneration %}
{%- if m.reasoning_content %} ({{ m.reasoning_content }}){% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ style | default('plain') }}>{% endif %}"""


def _tiny_tokenizer(**more) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"a": 0, "b": 1, "<s>": 2}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, {"bos_token": "<s>"}, chat_template=TEMPLATE, **more)


def test_template_features_as_transformers_renders_them():
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [
        {"role": "user", "content": " x ", "reasoning": "why"},
        {"role": "assistant", "content": "y", "skip": True},
        {"role": "assistant", "content": "zß<"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "ü & <"}}]
    for variables in ({}, {"style": "fancy"}):
        expected, _ = render_jinja_template(
            [chat], tools=tools, chat_template=TEMPLATE, add_generation_prompt=True,
            bos_token="<s>", **variables,
        )  # fmt: skip
        found = _tiny_tokenizer().apply_chat_template(chat, tools=tools, **variables)
        assert found == expected[0]


def test_template_refusals():
    tokenizer = _tiny_tokenizer(chat_templates={"tool_use": "tools: {{ tools | length }}"})
    with pytest.raises(RequestError, match="no bad role"):
        tokenizer.apply_chat_template([{"role": "bad", "content": ""}])
    for chat in ([{"content": "x"}], ["x"], "x", [{"role": 3}]):
        with pytest.raises(RequestError, match="role"):
            tokenizer.apply_chat_template(chat)
    with pytest.raises(ModelError, match="not valid Jinja"):
        tokenizer.apply_chat_template([], chat_template="{% for %}")
    # The sandbox keeps a template away from Python's insides.
    for evil in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(RequestError, match="refuses"):
            tokenizer.apply_chat_template([], chat_template=evil)
    # What a program can do wrong.
    for broken in (
        "{{ 1 / 0 }}", "{{ 2.0 ** 9999 }}", "{{ 'x' * 10 ** 15 }}", "{{ messages[9].role }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
    ):  # fmt: skip
        with pytest.raises(RequestError, match="refuses"):
            tokenizer.apply_chat_template([], chat_template=broken)
    with pytest.raises(ModelError, match="not valid Jinja"):
        tokenizer.apply_chat_template([], chat_template="{{" + "(" * 5000 + "1" + ")" * 5000 + "}}")
    assert tokenizer.apply_chat_template([], tools=[{}, {}]) == "tools: 2"
    assert tokenizer.apply_chat_template([], chat_template="tool_use", tools=[]) == "tools: 0"
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template([])


def test_what_is_no_text():
    tokenizer = _tiny_tokenizer()
    with pytest.raises(RequestError, match="lone surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(RequestError, match="a prompt is a string"):
        tokenizer.encode(3)


# Directories


def _train(directory, **config):
    """A small byte-level tokenizer saved by transformers."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(random_texts(300, seed=5), trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **config
    )
    made.save_pretrained(directory)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True, "add_eos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"},
        {"chat_template": {"default": "d{{ messages | length }}", "tool_use": "t"}},
    ],
)
def test_directory_equals_auto_tokenizer(tmp_path, config):
    from transformers import AutoTokenizer

    _train(tmp_path, **config)
    ours, theirs = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in random_texts(300, seed=6):
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_id == theirs.eos_token_id
    if "chat_template" in config:
        chat = [{"role": "user", "content": "hé"}]
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert ours.apply_chat_template(chat) == expected


def test_directory_without_tokenizer_json_goes_through_transformers(tmp_path):
    from transformers import AutoTokenizer

    _train(tmp_path / "new")
    import json

    model = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (old / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>", "bos_token": "<s>", '
        '"unk_token": "</s>"}'
    )
    ours, theirs = open_tokenizer(old), AutoTokenizer.from_pretrained(old)
    for text in random_texts(100, seed=8):
        assert ours.encode(text) == theirs.encode(text)


def test_directory_without_any_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="has no tokenizer"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match="damaged"):
        open_tokenizer(tmp_path)


def test_directory_with_damaged_side_files(tmp_path):
    _train(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"\u00b2": {}}}')
    open_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"chat_template\.jinja: is no UTF-8 text"):
        open_tokenizer(tmp_path)


# GGUF vocabularies of other kinds


def test_byte_alphabet_is_gpt2s():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert dict(enumerate(byte_alphabet())) == bytes_to_unicode()


def _sentencepiece_vocabulary() -> tuple[list[str], np.ndarray, np.ndarray]:
    words = ["\u2581the", "\u2581", "th", "he", "the", "\u2581t", "\u2581th", "an", "and",
             "\u2581and", "t", "h", "e", "a", "n", "d", "\u2581a", "\u2581an", "x"]  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    kinds = np.array([2, 3, 3] + [6] * 256 + [1] * len(words), dtype=np.int32)
    scores = np.zeros(len(tokens), dtype=np.float32)
    scores[259:] = -np.arange(len(words), dtype=np.float32)
    return tokens, scores, kinds


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_sentencepiece_equals_transformers(architecture):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

    tokens, scores, kinds = _sentencepiece_vocabulary()
    metadata = {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours = build_backend(metadata, "test")
    theirs, _ = convert_gguf_tokenizer(
        architecture,
        {"tokenizer_type": "llama", "tokens": tokens, "scores": scores.tolist(),
         "token_type": kinds.tolist()},
    )  # fmt: skip
    rng = random.Random(2)
    for _ in range(500):
        words = ["the", " and", "  the", "x", "é", "你", "<s>", " ", "an", "q"]
        text = "".join(rng.choice(words) for _ in range(rng.randint(0, 8)))
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False).ids == expected
        assert ours.decode(expected) == theirs.decode(expected)
    # llama.cpp's default for a sentencepiece vocabulary: BOS in front.
    assert ours.encode("the").ids[0] == 1


def test_derived_merges_reach_every_token():
    tokens, scores, _ = _sentencepiece_vocabulary()
    order = {t: i for i, t in enumerate(tokens)}
    merges = derived_merges(order, {t: float(scores[i]) for t, i in order.items()})
    assert merges[0] == ("\u2581", "the") or merges[0][0] + merges[0][1] == "\u2581the"
    assert all(left + right in order for left, right in merges)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "smollm", "gpt-2"])
def test_pre_tokenizers_build_and_keep_text(pre, smollm):
    """Splits are exact partitions: decoding gives the text back, whatever the vocabulary."""
    alphabet = byte_alphabet()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*alphabet, "th", "the", "12"],
        "tokenizer.ggml.merges": ["t h", "th e", "1 2"],
    }
    backend = build_backend(metadata, "test")
    import unicodedata

    for text in random_texts(200, seed=9):
        expected = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert backend.decode(backend.encode(text, add_special_tokens=False).ids) == expected
    digits = backend.encode("1212", add_special_tokens=False).ids
    assert len(digits) == {"qwen2": 4, "tekken": 4, "smollm": 4, "llama-bpe": 3, "gpt-4o": 3}.get(
        pre, 2
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "not a pair"),
        ({"tokenizer.ggml.merges": None}, "without merges"),
        ({"tokenizer.ggml.token_type": np.zeros(3, np.int32)}, "does not fit"),
    ],
)
def test_damaged_vocabularies(change, message):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": byte_alphabet(),
        "tokenizer.ggml.merges": [],
    }
    with pytest.raises(ModelError, match=message):
        build_backend(metadata | change, "test")


def test_the_source_gives_the_tokenizer(smollm):
    source = open_checkpoint(smollm)
    assert 2 in source.tokenizer().eos_token_ids
