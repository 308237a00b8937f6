"""transformers' generate in bf16: one static batch, padded on the left."""

import time

import torch
import transformers
from transformers import AutoModelForCausalLM

PAD = 0


def version() -> str:
    return transformers.__version__


class Engine:
    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int) -> float:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        start = time.perf_counter()
        self.model.generate(
            ids, attention_mask=mask, do_sample=False, pad_token_id=PAD, **limits
        )
        return time.perf_counter() - start
