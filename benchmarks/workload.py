"""The workload that engines are compared on.

An engine is an object with ``run(prompts, new_tokens) -> seconds``: exactly ``new_tokens``
greedy tokens for each prompt (lists of token ids), all handed over at once, from an empty cache.

``decode_bN``: tokens per second of N sequences together behind prompts of 128 tokens, the
prompts' own time taken off.  ``prefill_N``: prompt tokens per second of one prompt of N tokens.
``mixed``: tokens per second of 64 requests of 32 to 512 prompt tokens and 128 new ones,
everything included.  Token ids are random: speed does not depend on what they say.
"""

from __future__ import annotations

import random
from typing import Protocol

PROMPT_TOKENS = 128
NEW_TOKENS = 64
ATTEMPTS = 3
MIXED_REQUESTS = 64
MIXED_NEW_TOKENS = 128


class Engine(Protocol):
    def run(self, prompts: list[list[int]], new_tokens: int) -> float: ...


def parse(metric: str) -> tuple[str, int]:
    """``decode_b4`` -> (decode, 4), ``prefill_512`` -> (prefill, 512), ``mixed`` -> (mixed, 0)."""
    kind, _, number = metric.replace("_b", "_").partition("_")
    if kind == "mixed" and not number:
        return kind, 0
    if kind not in ("decode", "prefill") or not number.isdigit() or int(number) < 1:
        raise SystemExit(f"unknown metric {metric!r}: decode_bN, prefill_N or mixed")
    return kind, int(number)


def mixed_lengths() -> list[int]:
    """Prompt lengths of the mixed requests: the same in every run."""
    draw = random.Random(0)
    return [draw.choice([32, 64, 128, 256, 512]) for _ in range(MIXED_REQUESTS)]


def random_prompt(length: int, draw: random.Random) -> list[int]:
    return [draw.randrange(100, 40_000) for _ in range(length)]


def measure(engine: Engine, metric: str, seed: int) -> float:
    """One measurement of one metric, tokens per second."""
    draw = random.Random(seed)
    kind, number = parse(metric)
    if kind == "decode":
        prompts = [random_prompt(PROMPT_TOKENS, draw) for _ in range(number)]
        for _ in range(ATTEMPTS):
            first = engine.run(prompts, 1)
            whole = engine.run(prompts, 1 + NEW_TOKENS)
            if whole > first:
                return number * NEW_TOKENS / (whole - first)
        raise RuntimeError("the machine is too busy: more tokens took no longer than one")
    if kind == "prefill":
        return number / engine.run([random_prompt(number, draw)], 1)
    prompts = [random_prompt(length, draw) for length in mixed_lengths()]
    return MIXED_REQUESTS * MIXED_NEW_TOKENS / engine.run(prompts, MIXED_NEW_TOKENS)


def warm_up(engine: Engine, metrics: list[str]) -> None:
    """Whatever an engine compiles or allocates on first use is not what is timed."""
    draw = random.Random(12345)
    engine.run([random_prompt(PROMPT_TOKENS, draw)], 8)
    numbers = [parse(metric) for metric in metrics]
    batch = max((number for kind, number in numbers if kind == "decode"), default=1)
    if batch > 1:
        engine.run([random_prompt(PROMPT_TOKENS, draw) for _ in range(batch)], 4)
    for kind, number in numbers:
        if kind == "prefill":
            engine.run([random_prompt(number, draw)], 1)
