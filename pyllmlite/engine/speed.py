"""How fast a loaded model is: prefill and decode, measured through the engine."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from pyllmlite.core.errors import StepError
from pyllmlite.core.sampling import SamplingParams

if TYPE_CHECKING:
    from pyllmlite.engine.llm import LLM


def measure(llm: LLM, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """One run of ``batch`` requests with random prompts that share nothing.

    Prefill lasts until the last request has its first token; decode from there to the end, so
    that its steps all have the full batch.
    """
    built = llm.built
    draw = random.Random(batch)
    prompts = [
        {"prompt_token_ids": [draw.randrange(built.spec.vocab_size) for _ in range(prompt_tokens)]}
        for _ in range(batch)
    ]
    params = SamplingParams(
        max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        if output.error:
            raise StepError(output.error)
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    start = min(m.arrival_time for m in metrics)
    first = max(m.first_token_time or start for m in metrics)
    end = max(m.finished_time or start for m in metrics)
    decoded = sum(len(o.outputs[0].token_ids) - 1 for o in outputs)
    steps = new_tokens - 1
    per_step = (end - first) / steps if steps else None
    moved = sum(
        op["bytes"] for op in built.program.describe(batch, prompt_tokens + new_tokens // 2)
    )
    return {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "prefill_tokens_per_second": batch * prompt_tokens / (first - start),
        "decode_tokens_per_second": decoded / (end - first) if decoded else None,
        "time_to_first_token": first - start,
        "seconds_per_step": per_step,
        "decode_bytes_per_second": moved / per_step if per_step else None,
    }
