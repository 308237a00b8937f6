"""Calibration tokens: decided by number, length and seed; bad files are one clear line."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from pyllmlite.compress.calibration import calibration_tokens, read_texts, text_of
from pyllmlite.core.errors import ConfigError
from pyllmlite.model.source import open_checkpoint


@pytest.fixture(scope="module")
def source(model):
    return open_checkpoint(model)


def test_the_model_writes_the_same_again(source):
    first = calibration_tokens(source, sequences=3, length=20, seed=5)
    assert first.shape == (3, 20) and first.dtype == np.int32
    assert np.array_equal(first, calibration_tokens(source, sequences=3, length=20, seed=5))
    other = calibration_tokens(source, sequences=3, length=20, seed=6)
    assert not np.array_equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 3
    # A sequence depends on its number, not on how many others there are.
    assert np.array_equal(first[:2], calibration_tokens(source, sequences=2, length=20, seed=5))


def test_progress_is_told(source):
    told = []
    calibration_tokens(source, sequences=18, length=4, progress=lambda *p: told.append(p))
    assert told == [(16, 18), (18, 18)]


def test_windows_of_a_file(source, tmp_path):
    path = tmp_path / "prose.txt"
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1000)))
    path.write_text(text)
    whole = source.tokenizer().encode(text, add_special_tokens=False)
    found = calibration_tokens(source, str(path), sequences=7, length=30, seed=1)
    windows = [whole[i : i + 30] for i in range(0, len(whole) - 29, 30)]
    places = [windows.index(row) for row in found.tolist()]
    assert places == sorted(set(places)) and len(places) == 7
    again = calibration_tokens(source, str(path), sequences=7, length=30, seed=1)
    assert np.array_equal(found, again)
    other = calibration_tokens(source, str(path), sequences=7, length=30, seed=2)
    assert not np.array_equal(found, other)


def test_jsonl_documents_are_joined_by_an_end_of_text(source, tmp_path):
    path = tmp_path / "chat.jsonl"
    records = [
        {"text": "abc"},
        {"messages": [{"role": "user", "content": "de"}, {"role": "assistant", "content": "f"}]},
        "gh",
    ]
    path.write_text("\n\n".join(json.dumps(r) for r in records))
    tokenizer = source.tokenizer()
    found = calibration_tokens(source, str(path), sequences=1, length=10)
    assert tokenizer.decode(found[0].tolist(), skip_special_tokens=False) == (
        "abc<|im_end|>de\nf<|im_end|>g"
    )


def test_bad_files(source, tmp_path):
    def refused(name, content, text, **arguments):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=text) as caught:
            calibration_tokens(source, str(path), **({"sequences": 2, "length": 8} | arguments))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    refused("empty.txt", b"", "is empty")
    refused("blank.txt", b" \n\t ", "is empty")
    refused("latin.txt", "caf\xe9 ole".encode("latin-1"), "is not UTF-8 .byte 0xe9 at 3")
    refused("wide.txt", "some text".encode("utf-16-le"), "zero bytes")
    refused("short.txt", b"abc", "3 tokens are too few for 2 sequences of 8; give more text")
    refused("less.txt", b"abcdefghij", "it holds 1 sequences of that length")
    refused("bad.jsonl", b'{"text": "abc"}\n{"text": ', "line 2 is no JSON")
    refused("none.jsonl", b'{"title": "abc"}', "line 1 has no text; looked for text, content")


def test_json_lines_end_with_a_newline_only(tmp_path):
    path = tmp_path / "text.jsonl"
    records = [{"text": "ab\u2028cd\x85ef"}, {"text": "ghij"}]
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    path.write_bytes("\r\n".join(lines).encode())
    assert list(read_texts(path)) == [record["text"] for record in records]


def test_what_is_no_file(source, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such file"):
        calibration_tokens(source, "gone.txt", 1, 8)
    with pytest.raises(ConfigError, match="this is a directory"):
        calibration_tokens(source, str(tmp_path), 1, 8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        calibration_tokens(source, "org/name", 1, 8)


def test_a_data_set_by_name(source, monkeypatch):
    asked = []

    class Datasets:
        @staticmethod
        def load_dataset(*arguments, **options):
            asked.append((arguments, options))
            if "gone" in arguments[0]:
                raise FileNotFoundError("Dataset 'org/gone'\ndoesn't exist on the Hub")
            return iter([{"text": "abcdefgh"}] * 1000)

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    found = calibration_tokens(source, "org/name/config:test", 2, 9)
    assert found.shape == (2, 9)
    assert asked == [(("org/name", "config"), {"split": "test", "streaming": True})]
    with pytest.raises(ConfigError, match="data set 'org/gone' cannot be read: Dataset") as caught:
        calibration_tokens(source, "org/gone", 2, 9)
    assert "\n" not in str(caught.value)


def test_sizes(source):
    for sequences, length in [(0, 8), (1, 1), (1, 513)]:
        with pytest.raises(ConfigError, match="of 2 to 512 tokens"):
            calibration_tokens(source, "self", sequences, length)


def test_records():
    assert text_of({"conversations": [{"from": "a", "value": "x"}, {"value": "y"}]}, "") == "x\ny"
    assert text_of({"text": None, "content": "c"}, "") == "c"
