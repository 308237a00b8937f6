"""The sampler against transformers' logits processors and plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from pyllmlite.runtime.native import native

MASK = 0xFFFFFFFF


def philox_uniform(seed, position):
    """One draw of Philox4x32-10 (Salmon et al. 2011): 53 bits in [0, 1)."""
    c = [position, 0, 0, 0]
    k = [seed & MASK, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return ((c[0] << 32 | c[1]) >> 11) * 2.0**-53


def run(logits, tokens=None, masks=(), targets=(), **params):
    """One logit row per row of ``logits``, each with the same tokens before; returns the batch."""
    rows, vocab = logits.shape
    tokens = [1] if tokens is None else tokens
    table = np.arange(rows * 8, dtype=np.int32).reshape(rows, 8)
    most = min(20, vocab)
    batch = native().Batch(rows, 128, rows * len(tokens), rows, vocab, most, [(16, table)])
    batch.token_table[:, : len(tokens)] = tokens
    for row in range(rows):
        each = {k: v[row].item() if isinstance(v, np.ndarray) else v for k, v in params.items()}
        batch.set_sampling(row, **each)
    batch.set_step(range(rows), [0] * rows, [len(tokens)] * rows, [1] * rows, targets)
    for row, mask in enumerate(masks):
        batch.set_mask(row, mask)
    logits = np.ascontiguousarray(logits, np.float32)
    native().run_op(native().sample(vocab), [logits], batch, 2)
    return batch


def probabilities(logits, tokens, *, temperature, repetition_penalty, min_p, top_k, top_p):
    """What transformers' processors leave to sample from, in the sampler's order."""
    ids = torch.tensor([tokens])
    scores = torch.from_numpy(logits).double()[None]
    if repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(repetition_penalty)(ids, scores)
    scores = hf.TemperatureLogitsWarper(temperature)(ids, scores)
    if min_p:
        scores = hf.MinPLogitsWarper(min_p)(ids, scores)
    if top_k:
        scores = hf.TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = hf.TopPLogitsWarper(top_p)(ids, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize("vocab", [3, 200, 5000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 2},
        {"top_k": 40, "temperature": 1.7},
        {"top_p": 0.8},
        {"top_p": 0.05},
        {"min_p": 0.1},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.8, "min_p": 0.02, "top_k": 30, "top_p": 0.9, "temperature": 0.8},
    ],
)
def test_like_transformers(vocab, options):
    settings = {"temperature": 1.0, "repetition_penalty": 1.0}
    settings |= {"min_p": 0.0, "top_k": 0, "top_p": 1.0}
    settings |= options
    rng = np.random.default_rng(vocab)
    logits = 3 * rng.standard_normal(vocab, dtype=np.float32)
    tokens = [0, 2, 2, 1]
    seeds = rng.integers(0, 2**63, 300)
    batch = run(np.tile(logits, (300, 1)), tokens, seed=seeds, prompt_len=2, **settings)
    p = probabilities(logits, tokens, **settings)
    edges = np.cumsum(p)
    draws = np.array([philox_uniform(int(s), len(tokens)) for s in seeds])
    got = np.array(batch.token_list)
    assert (p[got] > 0).all()
    clear = np.abs(edges[None] - draws[:, None]).min(1) > 1e-5
    assert clear.mean() > 0.8
    want = np.searchsorted(edges, draws, side="right")
    assert (got[clear] == want[clear]).all()


def test_penalties_count_the_output():
    logits = np.zeros((1, 8), np.float32)
    logits[0] = [4, 4.1, 4.2, 4.3, 4.4, 4.5, 0, 0]
    tokens = [5, 5, 4, 4, 3]  # the prompt is [5, 5]

    def best(**penalty):
        return run(logits, tokens, temperature=0, **penalty).token_list[0]

    assert best(prompt_len=2) == 5
    assert best(prompt_len=2, frequency_penalty=0.1) == 5  # the prompt does not count
    assert best(prompt_len=0, frequency_penalty=0.1) == 5  # 4.5 - 0.2
    assert best(prompt_len=0, frequency_penalty=0.16) == 2  # 5 has 4.18, 3 has 4.14
    assert best(prompt_len=0, presence_penalty=0.5) == 2
    assert best(prompt_len=9, repetition_penalty=1.2) == 2  # this one counts the prompt


def test_bias_bans_and_mask():
    logits = np.arange(70, dtype=np.float32)[None]
    assert run(logits, temperature=0, bias_ids=[3], bias_values=[80.0]).token_list == [3]
    assert run(logits, temperature=0, banned_ids=[69, 68], min_len=2).token_list == [67]
    assert run(logits, temperature=0, banned_ids=[69, 68], min_len=1).token_list == [69]
    mask = np.array([0, 1 << 9, 0], np.uint32)
    assert run(logits, temperature=1, masks=[mask]).token_list == [41]
    nothing = run(logits, masks=[np.zeros(3, np.uint32)])
    assert nothing.any_failed and nothing.status.tolist() == [2]


def test_logprobs():
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((4, 1000), dtype=np.float32)
    batch = run(logits, targets=[-1, 7, -1, 999], temperature=0, num_logprobs=5)
    want = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    best = np.argsort(-want, axis=1, kind="stable")
    assert batch.token_list == [best[0, 0], 7, best[2, 0], 999]
    for row, token in enumerate(batch.token_list):
        assert batch.logprobs[row] == pytest.approx(want[row, token], abs=1e-5)
        assert best[row, batch.ranks[row] - 1] == token
        assert batch.top_ids[row, :5].tolist() == best[row, :5].tolist()
        assert batch.top_logprobs[row, :5] == pytest.approx(want[row, best[row, :5]], abs=1e-5)
    assert np.isnan(run(logits, temperature=0).logprobs).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_their_row_alone(bad):
    logits = np.zeros((3, 40), np.float32)
    logits[:, 5] = 1
    logits[1, 33] = bad
    batch = run(logits, temperature=0)
    assert batch.status.tolist() == [0, 1, 0] and batch.token_list == [5, 0, 5]
    logits[1, 33] = -np.inf
    assert not run(logits, temperature=0).any_failed


def test_frequencies_are_the_softmax():
    """Chi-square with 5 degrees of freedom: above 25.7 once in 10,000; the draws are fixed."""
    logits = np.array([0.3, -1, 2, 0, 1.1, 0.5], np.float32)
    n = 20000
    batch = run(np.tile(logits, (n, 1)), temperature=1.0, seed=np.arange(n))
    p = np.exp(logits.astype(np.float64))
    want = n * p / p.sum()
    got = np.bincount(batch.tokens, minlength=6)
    assert ((got - want) ** 2 / want).sum() < 25.7


def test_equal_logits_keep_the_lower_id_in_the_nucleus():
    logits = np.zeros((200, 10), np.float32)
    batch = run(logits, top_p=0.35, seed=np.arange(200))
    assert set(batch.token_list) == {0, 1, 2, 3}


@pytest.mark.parametrize("allowed", [[3], [1, 5, 64, 99], list(range(0, 101, 3)), None])
def test_the_best_after_the_mask(allowed):
    """Ids of those that the mask leaves, at log-probabilities of the raw distribution; what a bias
    adds counts, and -inf says that nothing more is allowed."""
    vocab, rng = 101, np.random.default_rng(4)
    logits = rng.standard_normal((1, vocab), dtype=np.float32) * 3
    batch = native().Batch(1, 8, 1, 1, vocab, 6, [])
    bias = {5: 2.5, 7: -1.0}
    batch.set_sampling(
        0, num_logprobs=6, temperature=0.0, top_of_processed=True, bias_ids=list(bias),
        bias_values=list(bias.values()),
    )  # fmt: skip
    batch.set_step([0], [2], [1], [1])
    want = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    raw = want.copy()
    for token, value in bias.items():
        want[token] += value
    if allowed is not None:
        bits = np.zeros((vocab + 31) // 32, np.uint32)
        for token in allowed:
            bits[token // 32] |= np.uint32(1 << token % 32)
        batch.set_mask(0, bits)
        want[[t for t in range(vocab) if t not in allowed]] = -np.inf
    native().run_op(native().sample(vocab), [logits], batch, 1)
    best = np.argsort(-want, kind="stable")[:6]
    count = int(np.isfinite(want[best]).sum())
    assert batch.top_ids[0][:count].tolist() == best[:count].tolist()
    np.testing.assert_allclose(batch.top_logprobs[0][:count], want[best[:count]], atol=1e-5)
    assert np.isneginf(batch.top_logprobs[0][count:]).all()
    # The token that was chosen keeps the raw distribution's.
    assert batch.token_list == [best[0]]
    np.testing.assert_allclose(batch.logprobs[0], raw[best[0]], atol=1e-5)
