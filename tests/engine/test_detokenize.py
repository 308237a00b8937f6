"""Pieces add up to the whole, characters come whole."""

import random

import pytest

from pyllmlite.engine.detokenize import Detokenizer
from pyllmlite.engine.stop import find_stop, held_back

tokenizers = pytest.importorskip("tokenizers")

TEXT = "Grüße, 世界! 🎉👩‍👩‍👧 naïve — ok.  Two  spaces\n\tTab. ①②③ é"


class Wrapped:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, token_ids, skip_special_tokens=True):
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)


def byte_level():
    """GPT-2's manner: every byte is a token of its own, so that characters are always split."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def sentence_piece():
    """Llama 2's manner: a space is the next word's first character, bytes fall back."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {f"<0x{i:02X}>": i for i in range(256)}
    for word in ["▁", "▁Two", "▁spaces", "▁a", "b", "c", "▁naïve", "<unk>"]:
        vocab[word] = len(vocab)
    for c in "abcdefghijklmnopqrstuvwxyzGrTbwok":
        vocab.setdefault(c, len(vocab))
    tokenizer = Tokenizer(
        models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_pieces_add_up(make):
    tokenizer = make()
    prompt = tokenizer.encode("ab ").ids
    whole = prompt + tokenizer.encode(TEXT).ids
    expected = tokenizer.decode(whole)[len(tokenizer.decode(prompt)) :]
    for cut in (1, 2, 3, 7, 1000):
        ids = list(prompt)
        detokenizer = Detokenizer(Wrapped(tokenizer), ids, len(prompt))
        pieces = []
        for start in range(len(prompt), len(whole), cut):
            ids += whole[start : start + cut]
            pieces.append(detokenizer.advance(len(ids)))
            assert "\ufffd" not in pieces[-1]
        pieces.append(detokenizer.finish(len(ids)))
        assert "".join(pieces) == expected == detokenizer.text
    ids = list(whole)  # all at once, at the end
    detokenizer = Detokenizer(Wrapped(tokenizer), ids, len(prompt))
    assert detokenizer.finish(len(ids)) == expected


def test_a_words_space_comes_with_it():
    tokenizer = sentence_piece()
    two, spaces = (tokenizer.token_to_id(t) for t in ("▁Two", "▁spaces"))
    ids = [two]
    detokenizer = Detokenizer(Wrapped(tokenizer), ids, 1)
    for _ in range(3):
        ids.append(spaces)
        assert detokenizer.advance(len(ids)) == " spaces"


def test_an_unfinished_character_is_given_at_the_end():
    tokenizer = byte_level()
    ids = tokenizer.encode("é").ids[:1]
    detokenizer = Detokenizer(Wrapped(tokenizer), ids, 0)
    assert detokenizer.advance(1) == ""
    assert detokenizer.finish(1) == "\ufffd"


def test_bytes_that_are_no_text_do_not_pile_up():
    tokenizer = byte_level()
    broken = tokenizer.encode("é").ids[1]  # a continuation byte without a beginning
    ids = []
    detokenizer = Detokenizer(Wrapped(tokenizer), ids, 0)
    for _ in range(100):
        ids.append(broken)
        detokenizer.advance(len(ids))
    assert len(detokenizer.text) > 80
    ids += tokenizer.encode("fine").ids
    detokenizer.advance(len(ids))
    detokenizer.finish(len(ids))
    assert detokenizer.text.endswith("fine")


def test_special_tokens_are_skipped_or_not():
    tokenizer = byte_level()
    end = tokenizer.token_to_id("<|end|>")
    ids = [*tokenizer.encode("ab").ids, *[end] * 200, *tokenizer.encode("cd").ids]
    assert Detokenizer(Wrapped(tokenizer), ids, 0).finish(len(ids)) == "abcd"
    step_by_step = Detokenizer(Wrapped(tokenizer), ids, 0)
    assert step_by_step.advance(len(ids)) == "abcd"
    shown = Detokenizer(Wrapped(tokenizer), ids, 0, skip_special_tokens=False)
    assert shown.finish(len(ids)) == "ab" + "<|end|>" * 200 + "cd"


def test_fork_goes_its_own_way():
    tokenizer = byte_level()
    ids = tokenizer.encode("aé").ids[:2]
    one = Detokenizer(Wrapped(tokenizer), ids, 0)
    one.advance(2)
    other_ids = list(ids)
    other = one.fork(other_ids)
    ids += tokenizer.encode("é").ids[1:]
    other_ids += tokenizer.encode("ê").ids[1:]
    assert one.advance(3) + other.advance(3) == "éê"
    assert (one.text, other.text) == ("aé", "aê")


def test_find_stop():
    assert find_stop("hello world", 5, ["wor"]) == (6, "wor")
    assert find_stop("hello world", 5, ["hell"]) is None  # it was there before
    assert find_stop("hello world", 1, ["world", "ld"]) == (6, "world")
    assert find_stop("abab", 4, ["ab", "aba"]) == (0, "aba")
    assert find_stop("", 0, ["a"]) is None
    assert find_stop("aa", 1, ["aaa"]) is None


def test_held_back_is_the_longest_beginning():
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices("ab", k=draw.randrange(12)))
        stops = ["".join(draw.choices("ab", k=draw.randrange(1, 9)))
                 for _ in range(draw.randrange(4))]  # fmt: skip
        want = max(
            (k for s in stops for k in range(len(s)) if k <= len(text) and text.endswith(s[:k])),
            default=0,
        )
        assert held_back(text, stops) == want
