"""vLLM's ``speculative_config`` in this package's words."""

from __future__ import annotations

from typing import Any

from pyllmlite.core.errors import ConfigError

# vLLM's methods and the proposers that do the same.
METHODS = {"ngram": "prompt-lookup", "draft_model": "draft-model"}
_OF_PROPOSER = ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max")
_OF_DRAFT_MODEL = {"quantization": "quantizer", "max_model_len": "max_model_len",
                   "revision": "revision"}  # fmt: skip


def from_speculative_config(config: Any) -> tuple[str, dict[str, Any]]:
    """The proposer's name and its options in ``extra``.

    Args:
        config: A dict with ``method`` (``ngram``, ``draft_model``; without, a ``model`` stands for
            the latter) and words of that method.
    Raises:
        ConfigError: A method or a word that is not known.
    """
    if not isinstance(config, dict):
        raise ConfigError(f"speculative_config must be a dict, got {config!r}")
    words = {name: value for name, value in config.items() if value is not None}
    model = words.pop("model", None)
    if model in ("ngram", "[ngram]"):  # how vLLM wrote it before there was a method
        model, words["method"] = None, "ngram"
    method = words.pop("method", None) or ("draft_model" if model else "ngram")
    if method not in METHODS:
        raise ConfigError(
            f"speculative_config: no method {method!r}; there are {', '.join(METHODS)}"
        )
    extra = {name: words.pop(name) for name in _OF_PROPOSER if name in words}
    if method == "draft_model":
        extra["draft_model"] = model
        options = {new: words.pop(old) for old, new in _OF_DRAFT_MODEL.items() if old in words}
        if options:
            extra["draft_options"] = options
    elif model is not None:
        words["model"] = model
    if words:
        raise ConfigError(
            f"speculative_config: method {method!r} does not know {', '.join(sorted(words))}"
        )
    return METHODS[method], extra
