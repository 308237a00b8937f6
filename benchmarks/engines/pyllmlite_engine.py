"""This package, prefix cache emptied before each run."""

import time

from pyllmlite import LLM, SamplingParams


class Engine:
    def __init__(self, model: str, threads: int) -> None:
        self.llm = LLM(
            model=model,
            threads=threads,
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_batched_tokens=1024,
            kv_cache_memory="2GB",
        )

    def run(self, prompts: list[list[int]], new_tokens: int) -> float:
        self.llm.reset_prefix_cache()
        params = SamplingParams(
            max_tokens=new_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start
