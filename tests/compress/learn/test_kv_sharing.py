"""Sharing KV heads: sums by hand, functions that must stay, costs beside all partitions."""

import itertools

import numpy as np
import pytest

from pyllmlite.compress.learn.kv_sharing import (
    AttentionWeights,
    balanced_groups,
    check_heads,
    pair_costs,
    reordered,
    share_heads,
)
from pyllmlite.core.errors import ConfigError

HIDDEN, DIM = 20, 6


def random_weights(heads=6, kv_heads=6, seed=0, rotated=True, hidden=HIDDEN):
    rng = np.random.default_rng(seed)
    return AttentionWeights(
        q=rng.standard_normal((heads * DIM, hidden + 1)),
        k=rng.standard_normal((kv_heads * DIM, hidden + 1)),
        v=rng.standard_normal((kv_heads * DIM, hidden + 1)),
        out=rng.standard_normal((hidden, heads * DIM)),
        num_heads=heads,
        num_kv_heads=kv_heads,
        inputs=np.append(rng.uniform(0.5, 2, hidden), 1.0),
        rotated=rotated,
    )


def attend(weights, inputs):
    """Causal attention with rotary embedding, half-split pairs, head by head and pair by pair."""
    tokens = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    q, k, v = (tokens @ part.T for part in (weights.q, weights.k, weights.v))
    half = DIM // 2

    def rotate(row, position):
        out = np.empty(DIM)
        for j in range(half):
            angle = position * 0.3 ** (j + 1)
            a, b = row[j], row[j + half]
            out[j] = a * np.cos(angle) - b * np.sin(angle)
            out[j + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    result = np.zeros((len(inputs), weights.num_heads * DIM))
    for head in range(weights.num_heads):
        mine = slice(head * DIM, (head + 1) * DIM)
        kv = head // weights.queries_per_kv
        theirs = slice(kv * DIM, (kv + 1) * DIM)
        for t in range(len(inputs)):
            query = rotate(q[t, mine], t)
            scores = np.array([query @ rotate(k[s, theirs], s) for s in range(t + 1)])
            p = np.exp(0.2 * (scores - scores.max()))
            result[t, mine] = (p / p.sum()) @ v[: t + 1, theirs]
    return result @ weights.out.T


INPUTS = np.random.default_rng(9).standard_normal((5, HIDDEN))


def test_the_mean_of_consecutive_heads():
    weights = random_weights()
    shared = share_heads(weights, 2)
    assert shared.num_kv_heads == 2 and shared.num_heads == 6
    for part in "kv":
        heads = getattr(weights, part).reshape(6, DIM, HIDDEN + 1)
        expected = np.concatenate([(heads[0] + heads[1] + heads[2]) / 3,
                                   (heads[3] + heads[4] + heads[5]) / 3])  # fmt: skip
        assert np.allclose(getattr(shared, part), expected, rtol=1e-14)
    assert np.array_equal(shared.q, weights.q) and np.array_equal(shared.out, weights.out)


def test_pooling_is_repeating_the_pooled_heads():
    """GQA with pooled heads is MHA whose heads are the pooled ones."""
    weights = random_weights()
    shared = share_heads(weights, 3)
    repeat = np.repeat(np.arange(3), 2)
    full = share_heads(weights, 3)
    k, v = (getattr(full, p).reshape(3, DIM, -1)[repeat].reshape(6 * DIM, -1) for p in "kv")
    multi = AttentionWeights(full.q, k, v, full.out, 6, 6, full.inputs, True)
    assert np.allclose(attend(shared, INPUTS), attend(multi, INPUTS), rtol=1e-12)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (8, 2)])
def test_another_order_is_the_same_function(heads, kv_heads):
    weights = random_weights(heads, kv_heads)
    order = np.random.default_rng(1).permutation(kv_heads).tolist()
    assert np.allclose(attend(reordered(weights, order), INPUTS), attend(weights, INPUTS))


@pytest.mark.parametrize(("heads", "kv_heads", "wanted"), [(6, 6, 2), (6, 6, 1), (8, 4, 2)])
def test_svd_loses_nothing_of_heads_that_differ_by_a_basis(heads, kv_heads, wanted):
    """Values turned by any matrix, keys turned and scaled in every rotated pair: one head."""
    weights = random_weights(heads, kv_heads)
    rng = np.random.default_rng(3)
    size = kv_heads // wanted
    k, v = weights.k.reshape(kv_heads, DIM, -1), weights.v.reshape(kv_heads, DIM, -1)
    for head in range(kv_heads):
        first = head // size * size
        v[head] = rng.standard_normal((DIM, DIM)) @ v[first]
        turn = rng.standard_normal(DIM // 2) + 1j * rng.standard_normal(DIM // 2)
        pairs = (k[first, : DIM // 2] + 1j * k[first, DIM // 2 :]) * turn[:, None]
        k[head] = np.concatenate([pairs.real, pairs.imag])
    shared = share_heads(weights, wanted, "svd")
    assert shared.num_kv_heads == wanted
    assert np.allclose(attend(shared, INPUTS), attend(weights, INPUTS), atol=1e-9)
    mean = share_heads(weights, wanted, "mean")
    assert not np.allclose(attend(mean, INPUTS), attend(weights, INPUTS), atol=0.1)


def test_svd_is_the_best_of_one_value_head():
    """Eckart and Young: what is lost is the sum of the squares of the singular values left out."""
    weights = random_weights(2, 2)
    weights = AttentionWeights(
        weights.q, weights.k, weights.v, np.tile(weights.out[:, :DIM], 2), 2, 2,
        weights.inputs, True,
    )  # fmt: skip
    shared = share_heads(weights, 1, "svd")
    lost = 0.0
    for head in range(2):
        mine = slice(head * DIM, (head + 1) * DIM)
        turn = np.linalg.lstsq(weights.out[:, mine], shared.out[:, mine], rcond=None)[0]
        lost += np.square((weights.v[mine] - turn @ shared.v) * weights.inputs).sum()
    values = np.linalg.svd(weights.v * weights.inputs, compute_uv=False)
    assert lost == pytest.approx(np.square(values[DIM:]).sum(), rel=1e-9)


def test_keys_under_a_norm_are_averaged():
    weights = random_weights(rotated=False)
    shared = share_heads(weights, 2, "svd")
    assert np.allclose(shared.k, share_heads(weights, 2).k)
    assert np.array_equal(shared.q, weights.q)
    assert not np.allclose(shared.v, share_heads(weights, 2).v)


@pytest.mark.parametrize("pooling", ["mean", "svd"])
def test_similar_heads_find_each_other(pooling):
    weights = random_weights()
    rng = np.random.default_rng(5)
    for part in (weights.k, weights.v):
        heads = part.reshape(6, DIM, -1)
        for a, b in ((0, 3), (1, 5), (2, 4)):
            heads[b] = heads[a] + 0.05 * rng.standard_normal(heads[a].shape)
    groups = balanced_groups(pair_costs(weights, pooling), 2)
    assert groups == [[0, 3], [1, 5], [2, 4]]
    together = share_heads(weights, 3, pooling, "similar")
    apart = share_heads(weights, 3, pooling, "consecutive")
    exact = attend(weights, INPUTS)
    errors = [np.square(attend(w, INPUTS) - exact).sum() for w in (together, apart)]
    assert errors[0] < 0.1 * errors[1]


def test_groups_beside_all_partitions():
    """Changing places finds what is best of all or close to it."""
    rng = np.random.default_rng(7)
    best = found = 0.0
    for _ in range(5):
        costs = rng.random((6, 6))
        costs = costs + costs.T
        np.fill_diagonal(costs, 0)

        def cost(groups, costs=costs):
            return sum(costs[a, b] for g in groups for a, b in itertools.combinations(g, 2))

        every = [
            cost([list(order[i : i + 2]) for i in (0, 2, 4)])
            for order in itertools.permutations(range(6))
        ]
        groups = balanced_groups(costs, 2)
        assert sorted(h for g in groups for h in g) == list(range(6))
        best, found = best + min(every), found + cost(groups)
    assert found <= 1.1 * best


def test_heads_that_cannot_share_are_refused():
    with pytest.raises(ConfigError, match="9 KV heads do not part into 2 .* possible are 1, 3$"):
        check_heads(9, 9, 2)
    with pytest.raises(ConfigError, match="3 KV heads for 9 query heads already.*: 1$"):
        check_heads(9, 3, 3)
    with pytest.raises(ConfigError, match="1 KV head already"):
        check_heads(9, 1, 1)
    with pytest.raises(ConfigError, match="at least 1"):
        check_heads(9, 9, 0)
    with pytest.raises(ConfigError, match="pooling must be one of mean, svd"):
        share_heads(random_weights(), 2, "median")
    with pytest.raises(ConfigError, match="grouping must be"):
        share_heads(random_weights(), 2, "mean", "random")
