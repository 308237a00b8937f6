"""Options that several commands share: one table for the engine, one for sampling.

``@shared(engine=ENGINE, sampling=SAMPLING)`` gives a command every option of the tables; its
parameters of those names get a dict of what the user set, and only that, so that defaults
live in one place: :class:`~pyllmlite.core.config.EngineConfig` and
:class:`~pyllmlite.core.sampling.SamplingParams`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

# name of the field -> (type, help); the flag is the name with dashes.
Table = dict[str, tuple[Any, str]]

ENGINE: Table = {
    "attention": (str, "Attention by name (pyllmlite plugins lists them)."),
    "cache": (str, "KV cache by name."),
    "quantizer": (str, "Quantizer by name: none, rtn, ..."),
    "scheduler": (str, "Scheduler by name."),
    "decoder": (str, "Decoder by name."),
    "proposer": (str, "What proposes draft tokens, by name."),
    "dtype": (str, "auto, f32 or bf16."),
    "device": (str, "auto, cpu or cuda."),
    "threads": (int, "CPU threads; all that this process may use if not given."),
    "max_model_len": (int, "Tokens of prompt and output of one sequence."),
    "max_num_seqs": (int, "Sequences that run at once."),
    "max_num_batched_tokens": (int, "Tokens of one step."),
    "kv_cache_memory": (str, "Memory for keys and values, as 512MB or 2GiB."),
    "kv_cache_dtype": (str, "How keys and values are stored: auto, or a word the cache knows."),
    "block_size": (int, "Tokens of a KV block."),
    "sliding_window": (int, "Tokens that every layer sees back at most."),
    "attention_sinks": (int, "First tokens that stay besides such a window."),
    "swap_space": (str, "Memory for preempted sequences: GiB, or as 512MB."),
    "preemption_mode": (str, "What a swap space is used by: auto, swap or recompute."),
    "enable_prefix_caching": (bool, "Prompts that begin alike share keys and values."),
    "bits": (int, "Bits of a quantized weight."),
    "group_size": (int, "Columns that share a scale."),
    "symmetric": (bool, "Quantize without zero points."),
    "max_logprobs": (int, "Most log-probabilities that a request may ask for."),
    "tokenizer": (str, "Where the tokenizer is, if not with the model."),
    "revision": (str, "Of a model on the hub."),
}

SAMPLING: Table = {
    "max_tokens": (int, "Tokens to generate at most."),
    "temperature": (float, "0 takes the likeliest token."),
    "top_p": (float, "Nucleus sampling: the likeliest tokens that make up this probability."),
    "top_k": (int, "Only the k likeliest tokens."),
    "min_p": (float, "Only tokens at least this likely beside the likeliest."),
    "seed": (int, "Same seed, same answer."),
    "repetition_penalty": (float, "Above 1: words that came before become less likely."),
    "stop": (list[str], "Text that ends the answer; may be given more than once."),
    "ignore_eos": (bool, "Go on past the model's end token."),
}


def _parameter(name: str, kind: Any, help: str, flag: str | None = None) -> inspect.Parameter:
    if flag is None:
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            flag += "/--no-" + name.replace("_", "-")
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            kind | None,
            typer.Option(
                flag,
                help=help,
                show_default=False,
                metavar="TEXT" if kind == list[str] else None,
            ),
        ],
    )


def parse_extra(pairs: list[str] | None) -> dict[str, Any]:
    """``["a=1", "b=word"]`` to ``{"a": 1, "b": "word"}``: JSON where it is JSON, else text."""
    extra: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--extra wants NAME=VALUE, got {pair!r}")
        try:
            extra[name] = json.loads(value)
        except ValueError:
            extra[name] = value
    return extra


def shared(**tables: Table) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of each table; the argument's name is the parameter's name."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name not in tables]
        added = [
            _parameter(name, kind, help)
            for table in tables.values()
            for name, (kind, help) in table.items()
        ]
        if "engine" in tables:
            help = "NAME=VALUE for a plugin's own option; may be given more than once."
            added.append(_parameter("extra", list[str], help))

        @functools.wraps(function)
        def command(**given: Any) -> None:
            groups: dict[str, dict[str, Any]] = {}
            for group, table in tables.items():
                values = {name: given.pop(name) for name in table}
                groups[group] = {n: v for n, v in values.items() if v is not None and v != []}
            if "engine" in tables:
                extra = parse_extra(given.pop("extra"))
                if extra:
                    groups["engine"]["extra"] = extra
            function(**given, **groups)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate
