"""Decoding with a draft model beside decoding without, one sequence at a time, in turn.

    python benchmarks/draft_speed.py TARGET DRAFT --data data.jsonl \\
        --options quantizer=rtn,bits=4 --draft-options quantizer=rtn,bits=4

Greedy, so that both write the same tokens (checked).  Times are wall clock; of each prompt the
least of the rounds counts, since other work only adds.  Acceptance is per drafted token that was
tried: tokens behind the first rejected one were not.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from pyllmlite import LLM, SamplingParams
from pyllmlite.compress.learn.records import read_records
from pyllmlite_plugins.decoder.draft_length import DraftLength

QUESTIONS = (
    "Give me three tips for sleeping well.", "What is the capital of France?",
    "Explain how rain forms.", "Write a short note of thanks to a colleague.",
    "How do I boil an egg?", "Describe a walk in the forest.",
    "What are the benefits of reading?", "Explain what a computer program is.",
)  # fmt: skip


def words(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def prompts_of(llm: LLM, data: str | None, count: int) -> list[list[int]]:
    """The last answers' prompts of a teacher's text (those that are held out), else questions."""
    if data is not None:
        kept = [r for r in read_records(Path(data))[1] if not r.dropped]
        return [r.prompt_token_ids for r in kept[-count:]]
    tokenizer = llm.get_tokenizer()
    return [
        tokenizer.encode(
            tokenizer.apply_chat_template([{"role": "user", "content": q}]),
            add_special_tokens=False,
        )
        for q in QUESTIONS[:count]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("draft")
    parser.add_argument("--data")
    parser.add_argument("--options", default="")
    parser.add_argument("--draft-options", default="")
    parser.add_argument("--draft-step-cost", type=float)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    extra: dict[str, Any] = {
        "draft_model": given.draft, "draft_options": words(given.draft_options),
    }  # fmt: skip
    if given.draft_step_cost is not None:
        extra["draft_step_cost"] = given.draft_step_cost
    llm = LLM(
        given.target, max_num_seqs=1, max_model_len=512, enable_prefix_caching=False,
        proposer="draft-model", extra=extra, **words(given.options),
    )  # fmt: skip
    counts = {"proposed": 0, "tried": 0, "accepted": 0, "drafts": 0}
    learn = DraftLength.learn

    def counted(self: DraftLength, proposed: int, accepted: int) -> None:
        counts["proposed"] += proposed
        counts["accepted"] += accepted
        counts["tried"] += accepted + (accepted < proposed)
        counts["drafts"] += proposed > 0
        learn(self, proposed, accepted)

    DraftLength.learn = counted  # type: ignore[method-assign]
    prompts = prompts_of(llm, given.data, given.prompts)
    best: dict[str, list[float]] = {"none": [], "draft-model": []}
    written: dict[str, list[list[int]]] = {"none": [], "draft-model": []}
    for ids in prompts:
        times: dict[str, float] = {}
        for _ in range(given.rounds):
            for name in best:
                params = SamplingParams(
                    temperature=0.0, max_tokens=given.tokens, ignore_eos=True, proposer=name
                )
                started = time.perf_counter()
                (output,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
                seconds = time.perf_counter() - started
                if name not in times:
                    written[name].append(list(output.outputs[0].token_ids))
                times[name] = min(times.get(name, seconds), seconds)
        for name in best:
            best[name].append(times[name])
    same = sum(a == b for a, b in zip(written["none"], written["draft-model"], strict=True))
    plain, drafted = sum(best["none"]), sum(best["draft-model"])
    tokens = given.tokens * len(prompts)
    print(
        json.dumps(
            {
                "plain_tokens_per_second": round(tokens / plain, 1),
                "drafted_tokens_per_second": round(tokens / drafted, 1),
                "speed_up": round(plain / drafted, 3),
                "speed_up_by_prompt": [
                    round(a / b, 2) for a, b in zip(best["none"], best["draft-model"], strict=True)
                ],
                "acceptance": round(counts["accepted"] / max(counts["tried"], 1), 3),
                **counts,
                "same_tokens": f"{same} of {len(prompts)}",
            }
        )
    )


if __name__ == "__main__":
    main()
