"""Filters, the file of records, prompts."""

import json

import pytest

from pyllmlite.compress.learn.batches import split_records
from pyllmlite.compress.learn.filters import Filters, confidence, repetition
from pyllmlite.compress.learn.records import Record, RecordFile, read_records
from pyllmlite.compress.learn.teacher_text import TextStats, read_prompts
from pyllmlite.core.errors import ConfigError


def record(index, tokens=(5, 6, 7), source=-1, dropped=None):
    return Record(index, "p", [1, 2], "é\u2028", list(tokens), "stop", 0.5, 0.0, source, dropped)


def written(path, count=3):
    file = RecordFile(path, {"seed": 1}, count)
    file.add([record(i) for i in range(count)])
    file.close()
    return path


def test_repetition():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4]) == 0.0
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 - 4 / 5)
    assert repetition([7] * 20) == pytest.approx(1 - 1 / 17)


def test_filters():
    filters = Filters(min_tokens=2, max_repetition=0.3, min_confidence=0.4)
    assert filters.refusal([1], 0.0, 0.9) == "length"
    assert filters.refusal([1, 2], 0.4, 0.9) == "repetition"
    assert filters.refusal([1, 2], 0.3, 0.3) == "confidence"
    assert filters.refusal([1, 2], 0.3, 0.4) is None
    assert confidence([-1.0, -3.0]) == pytest.approx(2.718281828**-2) and confidence([]) == 0.0
    with pytest.raises(ConfigError, match="max_repetition"):
        Filters(max_repetition=1.5)


def test_records_come_back(tmp_path):
    header, records = read_records(written(tmp_path / "d.jsonl"), vocab_size=8)
    assert header["settings"] == {"seed": 1}
    assert records == [record(i) for i in range(3)]  # U+2028 ends no line
    assert str(TextStats.of([*records, record(3, dropped="length")])) == (
        "4 answers, 3 kept, 9 tokens (dropped: 1 length)"
    )


def test_a_file_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path):
    whole = written(tmp_path / "whole.jsonl").read_bytes()
    for length in (1, 40, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"cut{length}.jsonl"
        path.write_bytes(whole[:length])
        file = RecordFile(path, {"seed": 1}, 3)
        assert not file.complete
        file.add([record(i) for i in range(len(file.records), 3)])
        file.close()
        assert path.read_bytes() == whole


def test_other_settings_are_refused(tmp_path):
    path = written(tmp_path / "d.jsonl")
    with pytest.raises(ConfigError, match="written with seed 1, now it is 2"):
        RecordFile(path, {"seed": 2}, 3)
    with pytest.raises(ConfigError, match="count"):
        RecordFile(path, {"seed": 1}, 4)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda b: b"", "is empty"),
        (lambda b: b[:20], "line 1 is cut off"),
        (lambda b: b[:-20], "line 4 is cut off"),
        (lambda b: b"\n".join(b.split(b"\n")[:-2]) + b"\n", "has 2 of 3 records"),
        (lambda b: b.replace(b'"index": 1', b'"index": 7'), "line 3 is no record"),
        (lambda b: b.replace(b"[5, 6", b"[-5, 6"), "line 2 is no record"),
        (lambda b: b"{}\n" + b, "is no teacher text"),
        (lambda b: b.replace(b'"version": 1', b'"version": 9'), "of version 9"),
        (lambda b: b"\xff\xfe" + b, "line 1 is no record"),
    ],
)
def test_bad_files_are_one_line(tmp_path, cut, words):
    path = written(tmp_path / "d.jsonl")
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(ConfigError, match=words) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_is_too_small(tmp_path):
    with pytest.raises(ConfigError, match="has the token 7, the model's vocabulary ends at 6"):
        read_records(written(tmp_path / "d.jsonl"), vocab_size=7)


def test_prompts(tmp_path):
    text = tmp_path / "p.txt"
    text.write_bytes("\ufeffone\r\n\r\ntwo\u2028still two\n".encode())
    assert read_prompts(text) == ["one", "two\u2028still two"]
    lines = tmp_path / "p.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    values = ["plain", {"prompt": "p"}, {"messages": messages}, {"text": "t"}]
    lines.write_text("\n".join(json.dumps(v) for v in values))
    assert read_prompts(lines) == ["plain", "p", messages, "t"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b" \n\n", "is empty"),
        ("p.jsonl", b'"a"\n{"prompt": "b', "line 2 is no JSON, or is cut off"),
        ("p.jsonl", b'{"a": 1}', "line 1 has no prompt"),
        ("p.txt", b"\xff", "is not UTF-8"),
    ],
)
def test_bad_prompts(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_prompts(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_answers_to_a_prompt_are_held_out_together():
    records = [record(i, source=i % 4) for i in range(12)]
    train, unseen = split_records(records, 2)
    assert unseen == [3, 7, 11]  # the other answers to the last one's prompt are unseen too
    assert sorted(train + unseen) == list(range(12))
    train, unseen = split_records([record(i) for i in range(5)], 2)
    assert (train, unseen) == ([0, 1, 2], [3, 4])
    with pytest.raises(ConfigError, match="nothing is left"):
        split_records([record(0), record(1, dropped="length")], 1)
