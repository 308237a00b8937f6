"""A tokenizer from a GGUF's metadata.

A GGUF names the kind of its vocabulary (``tokenizer.ggml.model``), for byte-level BPE how text is
split before the merges (``tokenizer.ggml.pre``; llama.cpp, llama-vocab.cpp), and which tokens are
control or user-defined ones.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.core.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

log = logging.getLogger("pyllmlite")

# Splits of the published tokenizers: tiktoken's cl100k as Llama 3 and Qwen2 changed it, Mistral's
# Tekken, o200k.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    + _TAIL
)
_QWEN2 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
)
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_TEKKEN = _WORDS % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
_GPT4O = (
    _WORDS % (_CONTRACTIONS + "?", _CONTRACTIONS + "?")
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    + _TAIL
)
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

_SPLITS = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), _BLOOM),
}
# Every digit is a piece of its own, then GPT-2's split.
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_GPT2 = ("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2", "dbrx")
# Vocabularies with tokens that no sequence of merges reaches; a whole piece is looked up first.
_IGNORE_MERGES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
_ADD_BOS = ("llama3", "llama-v3", "llama-bpe", "tekken")

_CONTROL, _USER_DEFINED = 3, 4


def byte_alphabet() -> list[str]:
    """GPT-2's character for every byte: printable ones stand for themselves, the others follow
    from U+0100 on (Radford et al. 2019, ``bytes_to_unicode``)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def derived_merges(order: dict[str, int], rank: dict[str, float]) -> list[tuple[str, str]]:
    """Merges of a SentencePiece vocabulary that lists none: every split of a token into two
    tokens, the best-scored token first.

    Args:
        order: Token to id.
        rank: Token to score, higher is merged earlier.
    """
    merges = []
    for token, score in rank.items():
        splits = [
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in order and token[cut:] in order
        ]
        splits.sort(key=lambda pair: (order[pair[0]], order[pair[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in splits]
    merges.sort(key=lambda m: m[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]


class GGUFVocabulary:
    """The ``tokenizer.*`` part of the metadata, checked."""

    def __init__(self, metadata: dict[str, Any], path: Any) -> None:
        self.metadata = metadata
        self.path = path
        tokens = self._get("tokens", [])
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise ModelError(f"{path}: its metadata holds no vocabulary")
        self.tokens: list[str] = tokens
        self.kinds = self._numbers("token_type")
        self.scores = self._numbers("scores")
        self.pre = str(self._get("pre", "default"))
        self.model = self._get("model")

    def _get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def _numbers(self, key: str) -> np.ndarray | None:
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise ModelError(f"{self.path}: {key} does not fit its {len(self.tokens)} tokens")
        return value

    def token_id(self, name: str) -> int | None:
        value = self._get(f"{name}_token_id")
        if isinstance(value, int) and 0 <= value < len(self.tokens):
            return value
        return None

    def of_kind(self, kind: int) -> list[int]:
        return [] if self.kinds is None else np.flatnonzero(self.kinds == kind).tolist()

    @property
    def add_bos(self) -> bool:
        # llama.cpp's defaults for files that do not say.
        default = self.model == "llama" or self.pre in _ADD_BOS
        return bool(self._get("add_bos_token", default))

    @property
    def add_eos(self) -> bool:
        return bool(self._get("add_eos_token", False))

    @property
    def space_prefix(self) -> bool:
        return bool(self._get("add_space_prefix", True))

    def merges(self) -> list[tuple[str, str]] | None:
        listed = self._get("merges")
        if listed is None:
            return None
        pairs = [tuple(m.split(" ")) for m in listed if isinstance(m, str)]
        if any(len(pair) != 2 for pair in pairs):
            raise ModelError(f"{self.path}: a merge is not a pair of tokens")
        return pairs  # type: ignore[return-value]


def build_backend(metadata: dict[str, Any], path: Any) -> Backend:
    """A ``tokenizers.Tokenizer`` for the vocabulary of a GGUF."""
    vocabulary = GGUFVocabulary(metadata, path)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if vocabulary.model not in builders:
        raise ModelError(
            f"{path}: tokenizer model {str(vocabulary.model)[:40]!r} is not supported; "
            f"known are {', '.join(builders)}"
        )
    try:
        backend = builders[vocabulary.model](vocabulary)
        _add_special(backend, vocabulary)
        _add_ends(backend, vocabulary)
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"{path}: its vocabulary is damaged ({str(error)[:120]})") from None
    return backend


def _byte_level(vocabulary: GGUFVocabulary) -> Backend:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = byte_alphabet()
    known = set(alphabet)
    whole = {*vocabulary.of_kind(_CONTROL), *vocabulary.of_kind(_USER_DEFINED)}
    ids: dict[str, int] = {}
    for index, token in enumerate(vocabulary.tokens):
        if index not in whole and not known.issuperset(token):
            # Some converters write the text of an added token instead of its bytes' characters.
            token = "".join(alphabet[b] for b in token.encode("utf-8"))
        ids.setdefault(token, index)
    merges = vocabulary.merges()
    if merges is None:
        raise ModelError(f"{vocabulary.path}: a byte-level vocabulary without merges")
    # A merge whose parts or result are no tokens would be refused; it could never apply.
    merges = [m for m in merges if m[0] in ids and m[1] in ids and m[0] + m[1] in ids]
    pre = vocabulary.pre
    backend = Tokenizer(
        BPE(vocab=ids, merges=merges, fuse_unk=False, ignore_merges=pre in _IGNORE_MERGES)
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif pre in _DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    else:
        if pre not in _GPT2:
            log.warning("%s: pre-tokenizer %r is not known; GPT-2's is used", vocabulary.path, pre)
        backend.pre_tokenizer = byte_level
    if pre in ("qwen2", "deepseek-r1-qwen"):
        from tokenizers import normalizers

        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(vocabulary: GGUFVocabulary) -> Backend:
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    tokens = vocabulary.tokens
    architecture = vocabulary.metadata.get("general.architecture")
    gemma = isinstance(architecture, str) and architecture.startswith("gemma")
    if gemma:
        # Runs of spaces stand as such in these files; the merges need them as U+2581.
        tokens = ["\u2581" * len(t) if t and not t.strip(" ") else t for t in tokens]
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        ids.setdefault(token, index)
    merges = vocabulary.merges()
    if merges is None:
        if gemma:
            # Gemma's scores do not follow the order of its merges; the order of its tokens does.
            rank = {token: -float(index) for token, index in ids.items()}
        elif vocabulary.scores is not None:
            rank = {token: float(vocabulary.scores[index]) for token, index in ids.items()}
        else:
            raise ModelError(f"{vocabulary.path}: a vocabulary with neither merges nor scores")
        merges = derived_merges(ids, rank)
    unknown = vocabulary.token_id("unknown")
    unk_token = tokens[unknown] if unknown is not None else "<unk>" if "<unk>" in ids else None
    backend = Tokenizer(
        BPE(vocab=ids, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unk_token)
    )
    sequence = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if architecture == "phi3":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        sequence.append(decoders.Strip(content=" ", left=1))
    elif gemma or not vocabulary.space_prefix:
        backend.normalizer = normalizers.Replace(" ", "\u2581")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement="\u2581", prepend_scheme="first", split=False
        )
        sequence.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(sequence)
    return backend


def _add_special(backend: Backend, vocabulary: GGUFVocabulary) -> None:
    from tokenizers import AddedToken

    def added(kind: int, special: bool) -> list[AddedToken]:
        tokens = [vocabulary.tokens[i] for i in vocabulary.of_kind(kind)]
        return [
            AddedToken(token, normalized=False, special=special)
            for token in tokens
            if token and backend.token_to_id(token) is not None
        ]

    backend.add_special_tokens(added(_CONTROL, True))
    backend.add_tokens(added(_USER_DEFINED, False))


def _add_ends(backend: Backend, vocabulary: GGUFVocabulary) -> None:
    bos = vocabulary.token_id("bos") if vocabulary.add_bos else None
    eos = vocabulary.token_id("eos") if vocabulary.add_eos else None
    set_ends(
        backend,
        None if bos is None else (vocabulary.tokens[bos], bos),
        None if eos is None else (vocabulary.tokens[eos], eos),
    )


def set_ends(
    backend: Backend, bos: tuple[str, int] | None, eos: tuple[str, int] | None
) -> None:
    """Have ``add_special_tokens`` put ``(token, id)`` before and behind a text."""
    from tokenizers import processors

    parts = ["$A:0"]
    if bos is not None:
        parts.insert(0, f"{bos[0]}:0")
    if eos is not None:
        parts.append(f"{eos[0]}:0")
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), special_tokens=[t for t in (bos, eos) if t is not None]
    )
