"""The workload that engines are compared on.

An engine is an object with ``run(prompts, new_tokens) -> seconds``: exactly ``new_tokens``
greedy tokens for each prompt (lists of token ids), all handed over at once, from an empty cache.

``decode_bN``: tokens per second of N sequences together behind prompts of 128 tokens, the
prompts' own time taken off.  ``prefill``: prompt tokens per second of one long prompt.
``mixed``: tokens per second of 64 requests of 32 to 512 prompt tokens and 128 new ones,
everything included.  Token ids are random: speed does not depend on what they say.
"""

from __future__ import annotations

import random
from typing import Protocol

PROMPT_TOKENS = 128
NEW_TOKENS = 64
PREFILL_TOKENS = 1024
MIXED_REQUESTS = 64
MIXED_NEW_TOKENS = 128


class Engine(Protocol):
    def run(self, prompts: list[list[int]], new_tokens: int) -> float: ...


def random_prompt(length: int, draw: random.Random) -> list[int]:
    return [draw.randrange(100, 40_000) for _ in range(length)]


def measure(engine: Engine, metric: str, seed: int) -> float:
    """One measurement of one metric, tokens per second."""
    draw = random.Random(seed)
    if metric.startswith("decode_b"):
        batch = int(metric.removeprefix("decode_b"))
        prompts = [random_prompt(PROMPT_TOKENS, draw) for _ in range(batch)]
        first = engine.run(prompts, 1)
        whole = engine.run(prompts, 1 + NEW_TOKENS)
        return batch * NEW_TOKENS / max(whole - first, 1e-9)
    if metric == "prefill":
        return PREFILL_TOKENS / engine.run([random_prompt(PREFILL_TOKENS, draw)], 1)
    if metric == "mixed":
        lengths = [draw.choice([32, 64, 128, 256, 512]) for _ in range(MIXED_REQUESTS)]
        prompts = [random_prompt(length, draw) for length in lengths]
        return MIXED_REQUESTS * MIXED_NEW_TOKENS / engine.run(prompts, MIXED_NEW_TOKENS)
    raise SystemExit(f"unknown metric {metric!r}: decode_bN, prefill or mixed")


def warm_up(engine: Engine, metrics: list[str]) -> None:
    """Whatever an engine compiles or allocates on first use is not what is timed."""
    draw = random.Random(12345)
    engine.run([random_prompt(PROMPT_TOKENS, draw)], 8)
    batches = [int(m.removeprefix("decode_b")) for m in metrics if m.startswith("decode_b")]
    if batches:
        engine.run([random_prompt(PROMPT_TOKENS, draw) for _ in range(max(batches))], 4)
    if "prefill" in metrics:
        engine.run([random_prompt(PREFILL_TOKENS, draw)], 1)
