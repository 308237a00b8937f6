"""Text to tokens and back, by the ``tokenizers`` library, from what a checkpoint brings.

``tokenizer.json`` or a GGUF's metadata are read directly, in a fraction of the time that
transformers takes to be imported; only a directory that has neither goes through it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllmlite.core.errors import ModelError, RequestError
from pyllmlite.model import chat_template as templates
from pyllmlite.model.gguf import GGUFCheckpoint
from pyllmlite.model.gguf_names import end_tokens
from pyllmlite.model.gguf_tokenizer import GGUFVocabulary, build_backend, set_ends
from pyllmlite.model.safetensors import parse_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

    from pyllmlite.model.source import ModelSource

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# The largest tokenizer.json in use (a vocabulary of 262,144 with its merges) has 35 MB.
_MAX_FILE = 256 << 20
# Characters and tokens up to which one call does: the library lets other threads run only while it
# works on a batch, so that a text of megabytes would stop a whole server for seconds.
_SHORT = 1024


class Tokenizer:
    """A checkpoint's tokenizer; safe to be used by several threads.

    Attributes:
        backend: The ``tokenizers.Tokenizer``.
        special_tokens: ``bos_token``, ``eos_token``, ... to their text, as templates read them.
        bos_token_id: None if there is none.
        eos_token_ids: Ids that end an answer.
        chat_template: Jinja source; None: the model has none.
        chat_templates: Further ones by name (``tool_use``).
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: dict[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
        chat_template: str | None = None,
        chat_templates: dict[str, str] | None = None,
    ) -> None:
        self.backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = special_tokens or {}
        self.bos_token_id = self._special_id("bos_token")
        own = self._special_id("eos_token")
        ends = [*eos_token_ids, *([] if own is None else [own])]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self.chat_template = chat_template
        self.chat_templates = chat_templates or {}
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def all_special_ids(self) -> list[int]:
        added = self.backend.get_added_tokens_decoder()
        return [index for index, token in added.items() if token.special]

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: Put BOS and EOS where the model wants them.  A text made by
                :meth:`apply_chat_template` has them already.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of several texts, in parallel."""
        for text in texts:
            if not isinstance(text, str):
                raise RequestError(f"a prompt is a string, got {type(text).__name__}")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise RequestError("the prompt holds a lone surrogate, it is not text") from None
        if len(texts) == 1 and len(texts[0]) <= _SHORT:
            return [self.backend.encode(texts[0], add_special_tokens=add_special_tokens).ids]
        found = self.backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in found]

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no whole character come out as U+FFFD.  Ids without a
        token (a vocabulary padded up for the hardware) come out as nothing."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        if len(ids) > _SHORT:
            return self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it."""
        return self.backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def apply_chat_template(
        self,
        messages: list[Any],
        add_generation_prompt: bool = True,
        tools: list[Any] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """Messages as one prompt, as transformers' ``apply_chat_template(tokenize=False)``.

        Args:
            messages: Mappings with ``role`` and ``content``.
            add_generation_prompt: End with the beginning of the assistant's answer.
            tools: JSON schemas of functions.
            chat_template: Jinja source, or the name of one of ``chat_templates``; None: the
                model's own.
            variables: Further names that the template reads.
        Raises:
            RequestError: The model has no template, or it refuses the messages.
        """
        source = chat_template
        if source is None and tools is not None:
            source = self.chat_templates.get("tool_use")
        source = self.chat_templates.get(source, source) if source else self.chat_template
        if source is None:
            raise RequestError(
                "the model has no chat template; use generate() with a prompt, or pass "
                "chat_template="
            )
        return templates.render(
            source,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            **{**self.special_tokens, **variables},
        )


def load_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer of an open model."""
    ends = source.spec.eos_token_ids
    if isinstance(source.checkpoint, GGUFCheckpoint):
        return _from_gguf(source.checkpoint, ends)
    return _from_directory(source.path, ends)


def open_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer alone: a directory, a ``tokenizer.json`` or a ``.gguf`` file."""
    path = Path(path)
    if path.is_dir():
        return _from_directory(path, ())
    if path.name.endswith(".json"):
        return _from_directory(path.parent, ())
    return _from_gguf(GGUFCheckpoint(path), ())


def _from_gguf(checkpoint: GGUFCheckpoint, ends: Iterable[int]) -> Tokenizer:
    metadata = checkpoint.metadata
    backend = build_backend(metadata, checkpoint.path)
    vocabulary = GGUFVocabulary(metadata, checkpoint.path)
    special = {}
    for name, key in zip(_SPECIAL, ("bos", "eos", "unknown", "padding"), strict=True):
        index = vocabulary.token_id(key)
        if index is not None:
            special[name] = vocabulary.tokens[index]
    template = metadata.get("tokenizer.chat_template")
    named = metadata.get("tokenizer.chat_templates")
    others = {
        name: metadata[f"tokenizer.chat_template.{name}"]
        for name in (named if isinstance(named, list) else [])
        if isinstance(metadata.get(f"tokenizer.chat_template.{name}"), str)
    }
    return Tokenizer(
        backend,
        special,
        [*ends, *end_tokens(metadata)],
        template if isinstance(template, str) else None,
        others,
    )


def _json_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_FILE:
        raise ModelError(f"{path}: larger than {_MAX_FILE} bytes")
    parsed = parse_json(path.read_bytes(), str(path))
    if not isinstance(parsed, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return parsed


def _text_file(path: Path) -> str:
    if path.stat().st_size > _MAX_FILE:
        raise ModelError(f"{path}: larger than {_MAX_FILE} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError:
        raise ModelError(f"{path}: is no UTF-8 text") from None


def _content(token: Any) -> str | None:
    """A special token is its text, or an object that holds it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _from_directory(path: Path, ends: Iterable[int]) -> Tokenizer:
    config = _json_file(path / "tokenizer_config.json")
    special_map = _json_file(path / "special_tokens_map.json")
    if not (path / "tokenizer.json").is_file():
        return _from_transformers(path, ends)
    if (path / "tokenizer.json").stat().st_size > _MAX_FILE:
        raise ModelError(f"{path / 'tokenizer.json'}: larger than {_MAX_FILE} bytes")
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ModelError(f"{path / 'tokenizer.json'}: damaged ({str(error)[:120]})") from None
    special = {}
    for name in _SPECIAL:
        text = _content(config.get(name, special_map.get(name)))
        if text is not None:
            special[name] = text
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        known = backend.get_vocab(with_added_tokens=True)
        order = sorted((k for k in listed if k.isascii() and k.isdigit()), key=int)
        missing = [listed[k] for k in order if _content(listed[k]) not in (None, *known)]
        for token in missing:
            backend.add_tokens(
                [AddedToken(_content(token) or "", special=bool(token.get("special")))]
            )
    if "add_bos_token" in config or "add_eos_token" in config:
        found = []
        for name in ("bos_token", "eos_token"):
            text = special.get(name)
            index = None if text is None else backend.token_to_id(text)
            wanted = bool(config.get(f"add_{name}"))
            found.append((text, index) if wanted and text and index is not None else None)
        set_ends(backend, found[0], found[1])
    template, others = _templates(path, config)
    return Tokenizer(backend, special, ends, template, others)


def _templates(path: Path, config: dict[str, Any]) -> tuple[str | None, dict[str, str]]:
    """``chat_template.jinja`` goes before the config's own; several are a list of name and text."""
    found = config.get("chat_template")
    named: dict[str, str] = {}
    if isinstance(found, list):
        named = {
            t["name"]: t["template"]
            for t in found
            if isinstance(t, dict)
            and isinstance(t.get("name"), str)
            and isinstance(t.get("template"), str)
        }
        found = named.get("default")
    folder = path / "additional_chat_templates"
    if folder.is_dir():
        for file in sorted(folder.glob("*.jinja")):
            named[file.stem] = _text_file(file)
    own = path / "chat_template.jinja"
    if own.is_file():
        found = _text_file(own)
    return found if isinstance(found, str) else None, named


def _from_transformers(path: Path, ends: Iterable[int]) -> Tokenizer:
    """Older checkpoints (``vocab.json``, ``tokenizer.model``): converted by transformers."""
    files = ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt", "tekken.json")
    if not any((path / name).is_file() for name in files):
        raise ModelError(
            f"{path}: has no tokenizer (no tokenizer.json); copy it there, give tokenizer=, or "
            "pass skip_tokenizer_init=True and token ids"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ModelError(
            f"{path}: has no tokenizer.json, and converting the older files needs transformers"
        ) from None
    try:
        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{path}: transformers cannot load its tokenizer ({reason})") from None
    backend: Any = getattr(loaded, "backend_tokenizer", None)
    if not hasattr(backend, "get_vocab_size"):
        raise ModelError(f"{path}: its tokenizer has no fast form; save it as tokenizer.json")
    special = {n: str(getattr(loaded, n)) for n in _SPECIAL if getattr(loaded, n, None)}
    template = loaded.chat_template
    named = template if isinstance(template, dict) else {}
    if isinstance(template, dict):
        template = template.get("default")
    return Tokenizer(backend, special, ends, template, named)
