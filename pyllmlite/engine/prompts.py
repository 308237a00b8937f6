"""From what users hand over to token ids; everything wrong with a prompt is said here."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pyllmlite.core.errors import RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]


def is_single(prompts: object) -> bool:
    """One prompt, or a list of them?  A list of ints is one."""
    if isinstance(prompts, (str, bytes, Mapping)):
        return True
    if not isinstance(prompts, Iterable):
        return True
    return _is_ids(prompts)


def _is_ids(prompt: object) -> bool:
    if not hasattr(prompt, "__len__") or not hasattr(prompt, "__getitem__"):
        return False
    if len(prompt) == 0:
        return False
    try:
        operator.index(prompt[0])
    except TypeError:  # also what an array of arrays says
        return False
    return True


def parse_prompt(prompt: object, tokenizer: Any) -> tuple[str | None, list[int]]:
    """Text (if there is one) and token ids.

    Args:
        prompt: Text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``.
    """
    text: object = None
    ids: object = None
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Mapping):
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is None and ids is None:
            raise RequestError(
                "a prompt given as a dict needs 'prompt' or 'prompt_token_ids', got "
                f"{sorted(map(str, prompt))}"
            )
    elif hasattr(prompt, "__len__") and hasattr(prompt, "__getitem__"):
        ids = prompt
    else:
        raise RequestError(
            f"a prompt is a string, a list of token ids or a dict, got {type(prompt).__name__}"
        )
    if text is not None and not isinstance(text, str):
        raise RequestError(f"'prompt' must be a string, got {type(text).__name__}")
    if ids is None:
        if tokenizer is None:
            raise RequestError("there is no tokenizer: give the prompt as token ids")
        return text, list(tokenizer.encode(text))
    try:
        return text, [operator.index(token) for token in ids]  # type: ignore[attr-defined]
    except TypeError:
        raise RequestError("prompt_token_ids must be a list of integers") from None


def check_prompt(ids: list[int], vocab_size: int, max_model_len: int, cache_len: int) -> None:
    """``RequestError`` for what cannot run."""
    if not ids:
        raise RequestError("the prompt is empty: at least one token is needed")
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(f"token id {bad} is not in [0, {vocab_size}), the model's vocabulary")
    if len(ids) >= max_model_len:
        raise RequestError(
            f"the prompt has {len(ids)} tokens; with max_model_len {max_model_len} at most "
            f"{max_model_len - 1} leave room for an answer"
        )
    if len(ids) > cache_len:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, the KV cache holds {cache_len}; "
            "raise kv_cache_memory"
        )
