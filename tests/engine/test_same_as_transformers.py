"""Greedy continuations against transformers' float32 eager model: the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import TINY, reference

from pyllmlite import LLM, SamplingParams

torch = pytest.importorskip("torch")

NEW_TOKENS = 64
NUM_PROMPTS = 20


def assert_greedy(model, prompt: list[int], ours: list[int], gap: float = 1e-3) -> None:
    """Every token of ours is the best one given the tokens before it, by transformers' logits; a
    difference counts where the best two differ by more than ``gap``."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ours[:-1]])).logits[0, len(prompt) - 1 :].numpy()
    for i, (row, token) in enumerate(zip(logits, ours, strict=True)):
        assert row.max() - row[token] <= gap, f"token {i}: {token}, expected {row.argmax()}"


def prompts(vocab_size: int, longest: int) -> list[list[int]]:
    rng = np.random.default_rng(11)
    lengths = [1, 2, 15, 16, 17, *rng.integers(3, longest, NUM_PROMPTS - 5).tolist()]
    return [rng.integers(3, vocab_size, length).tolist() for length in lengths]


@pytest.mark.parametrize("name", list(TINY))
def test_tiny_models(name, tmp_path):
    path = TINY[name](tmp_path)
    options = {"max_model_len": 320} if "longrope" in name else {}
    llm = LLM(
        str(path),
        dtype="f32",
        skip_tokenizer_init=True,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        kv_cache_memory="32MB",
        **options,
    )
    asked = prompts(llm.engine.built.spec.vocab_size, 100)
    params = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False
    )
    model = reference(path)
    for prompt, output in zip(asked, llm.generate(asked, params, use_tqdm=False), strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == NEW_TOKENS
        assert_greedy(model, prompt, tokens)
