"""From a request's body to :class:`SamplingParams`; what cannot be done is refused here."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from pyllmlite.core.errors import RequestError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.serve.errors import ApiError
from pyllmlite.serve.protocol import ChatRequest, CompletionRequest, Sampling
from pyllmlite.serve.tools import forced_call

# Fields whose name and meaning are the same on both sides.
_SAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "skip_special_tokens", "include_stop_str_in_output",
)  # fmt: skip
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
# Bytes of JSON: a grammar takes the longer to compile the longer it is.
_MAX_STRUCTURED = 64 << 10
_FIELDS = {field.name for field in fields(SamplingParams)}


def _make(given: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise ApiError(400, str(error)) from None


def _common(body: Sampling) -> dict[str, Any]:
    given = {name: getattr(body, name) for name in _SAME}
    given = {name: value for name, value in given.items() if value is not None}
    if body.logit_bias:
        given["logit_bias"] = _bias(body.logit_bias)
    structured = _structured(body)
    if structured is not None:
        given["structured_outputs"] = _supported(structured, "response_format")
    return given


def _supported(structured: dict[str, Any], param: str) -> dict[str, Any]:
    if "structured_outputs" not in _FIELDS:
        raise ApiError(
            400,
            "constrained output (response_format with JSON, structured_outputs, guided_*, a "
            "tool_choice that forces a call) is not supported by this engine; ask for the form in "
            "the prompt",
            param=param,
            code="unsupported",
        )
    try:
        size = len(json.dumps(structured))
    except RecursionError:
        raise ApiError(400, f"{param} is nested too deeply", param=param) from None
    if size > _MAX_STRUCTURED:
        raise ApiError(
            400,
            f"the constraint on the output has {size} bytes as JSON; at most {_MAX_STRUCTURED} "
            "are taken",
            param=param,
        )
    return structured


def _bias(bias: dict[str, float]) -> dict[int, float]:
    found = {}
    for token, value in bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise ApiError(400, "logit_bias maps token ids to numbers", param="logit_bias")
        found[int(token)] = value
    return found


def _structured(body: Sampling) -> dict[str, Any] | None:
    """In vLLM's words: ``{"json": schema}``, ``{"regex": ...}``, ..."""
    if body.structured_outputs is not None:
        return body.structured_outputs
    for name in _GUIDED:
        value = getattr(body, name)
        if value is not None:
            return {name.removeprefix("guided_"): value}
    form = getattr(body, "response_format", None)
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"json_object": True}
    schema = (form.json_schema or {}).get("schema")
    if not isinstance(schema, (dict, bool)):
        raise ApiError(
            400, "response_format needs json_schema.schema, a JSON schema", param="response_format"
        )
    return {"json": schema}


def completion_params(body: CompletionRequest) -> SamplingParams:
    """Of ``/v1/completions``."""
    if body.suffix:
        raise ApiError(400, "suffix is not supported", param="suffix", code="unsupported")
    given = _common(body)
    if body.best_of is not None and body.best_of != (body.n or 1):
        if "best_of" not in _FIELDS:
            raise ApiError(400, "best_of must equal n", param="best_of", code="unsupported")
        given["best_of"] = body.best_of
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens 0 makes sense with echo only", param="max_tokens")
    # With echo alone one token is computed and not shown.
    given["max_tokens"] = 1 if body.max_tokens == 0 else body.max_tokens
    if body.logprobs is not None:
        given["logprobs"] = body.logprobs
        if body.echo:
            given["prompt_logprobs"] = body.logprobs
    return _make(given)


def chat_params(body: ChatRequest) -> SamplingParams:
    """Of ``/v1/chat/completions``."""
    given = _common(body)
    limit = body.max_completion_tokens
    given["max_tokens"] = limit if limit is not None else body.max_tokens
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    forced = forced_call(body)
    if forced is not None:
        given["structured_outputs"] = _supported({"json": forced}, "tool_choice")
    return _make(given)
