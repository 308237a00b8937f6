"""This package, prefix cache emptied before each run.

``model?option=value&...`` hands options to ``LLM``: ``model?quantizer=rtn&bits=4&group_size=64``.
"""

import time
from typing import Any

from limits import split_options

from pyllmlite import LLM, SamplingParams, __version__


def version() -> str:
    return __version__


class Engine:
    def __init__(self, model: str, threads: int) -> None:
        path, options = split_options(model)
        settings: dict[str, Any] = {
            "max_model_len": 2048,
            "max_num_batched_tokens": 1024,
            "kv_cache_memory": "2GB",
            **options,
        }
        self.llm = LLM(model=path, threads=threads, skip_tokenizer_init=True, **settings)

    def facts(self) -> dict[str, Any]:
        """What the limits are computed from, op by op."""
        built = self.llm.built
        costs = [vars(entry.cost) for entry in built.program.entries]
        return {"explain": built.explain(), "weight_bytes": built.weight_bytes, "costs": costs}

    def run(self, prompts: list[list[int]], new_tokens: int) -> float:
        self.llm.reset_prefix_cache()
        params = SamplingParams(
            max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start
