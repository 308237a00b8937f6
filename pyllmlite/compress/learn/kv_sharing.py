"""Fewer key and value heads: multi-head attention becomes grouped- or multi-query attention.

Ainslie et al. 2023 ("GQA", section 2.1): the key and value heads of a group become their mean, and
a short training on the same kind of text ("uptraining") wins back most of what that lost.  Two
things here change what is averaged, and not what the model computes:

- *Grouping.*  Which heads share is free: query heads are put in another order, the columns of the
  output matrix with them.
- *Bases.*  A value head may be turned by any matrix if the columns of the output matrix that read
  it are turned back; a key head may be turned and scaled within each pair of rotated channels if
  its queries are turned back, since such maps commute with the rotary embedding.  Heads that
  differ by no more than that are one head.  ``svd`` takes the bases in which the group is best
  stood for by one head: a truncated singular value decomposition (as Jin et al. 2024, "Align
  Attention Heads Before Merging Them", and Ji et al. 2025, section 3.2, do it in parts).

NumPy, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pyllmlite.core.errors import ConfigError

POOLINGS = ("mean", "svd")
GROUPINGS = ("consecutive", "similar")


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's attention, float64.

    Attributes:
        q: ``[heads * head_dim, hidden + 1]``; the last column is the bias (zeros if there is none).
        k, v: ``[kv_heads * head_dim, hidden + 1]``, likewise.
        out: ``[hidden, heads * head_dim]``, without its bias, which sharing does not touch.
        inputs: ``[hidden + 1]``: by how much a column of q, k, v counts: the size of its input (the
            norm's weight before it), and 1 for the bias.
        rotated: The whole head is rotated, and no norm stands between k and its rotation: keys may
            be turned.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out: np.ndarray
    num_heads: int
    num_kv_heads: int
    inputs: np.ndarray
    rotated: bool

    @property
    def head_dim(self) -> int:
        return self.q.shape[0] // self.num_heads

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


def check_heads(num_heads: int, num_kv_heads: int, wanted: int) -> None:
    """``ConfigError`` unless a model of these heads can share ``wanted`` KV heads."""
    if not 1 <= wanted:
        raise ConfigError(f"there must be at least 1 KV head, got {wanted}")
    if wanted >= num_kv_heads:
        raise ConfigError(
            f"the model has {num_kv_heads} KV heads for {num_heads} query heads already; ask for "
            f"fewer: {_divisors(num_kv_heads)}"
            if num_kv_heads > 1
            else "the model has 1 KV head already (multi-query attention): there are none to share"
        )
    if num_kv_heads % wanted:
        raise ConfigError(
            f"{num_kv_heads} KV heads do not part into {wanted} groups of one size; "
            f"possible are {_divisors(num_kv_heads)}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number) if number % n == 0)


def share_heads(
    weights: AttentionWeights,
    kv_heads: int,
    pooling: str = "mean",
    grouping: str = "consecutive",
) -> AttentionWeights:
    """The layer with ``kv_heads`` key and value heads.

    Args:
        pooling: ``mean``, or ``svd``: the best bases first (see the module).
        grouping: ``consecutive`` heads share, or ``similar`` ones.
    Raises:
        ConfigError: The heads do not part into so many groups of one size.
    """
    check_heads(weights.num_heads, weights.num_kv_heads, kv_heads)
    for name, value, known in (("pooling", pooling, POOLINGS), ("grouping", grouping, GROUPINGS)):
        if value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    size = weights.num_kv_heads // kv_heads
    if grouping == "similar" and kv_heads > 1:
        groups = balanced_groups(pair_costs(weights, pooling), size)
        weights = reordered(weights, [head for group in groups for head in group])
    if pooling == "svd":
        return _by_svd(weights, kv_heads)
    pooled = [
        part.reshape(kv_heads, size, weights.head_dim, -1).mean(1).reshape(-1, part.shape[1])
        for part in (weights.k, weights.v)
    ]
    return replace(weights, k=pooled[0], v=pooled[1], num_kv_heads=kv_heads)


def reordered(weights: AttentionWeights, order: list[int]) -> AttentionWeights:
    """KV heads in another order, their query heads and the output's columns with them: the same
    function."""
    dim, per = weights.head_dim, weights.queries_per_kv
    kv_rows = _rows_of(order, dim)
    q_rows = _rows_of([per * head + i for head in order for i in range(per)], dim)
    return replace(
        weights,
        q=weights.q[q_rows],
        k=weights.k[kv_rows],
        v=weights.v[kv_rows],
        out=weights.out[:, q_rows],
    )


def _rows_of(heads: list[int], dim: int) -> np.ndarray:
    return (np.asarray(heads)[:, None] * dim + np.arange(dim)).reshape(-1)


# -- the best bases ----------------------------------------------------------------------------
def _by_svd(weights: AttentionWeights, kv_heads: int) -> AttentionWeights:
    size, dim, per = weights.num_kv_heads // kv_heads, weights.head_dim, weights.queries_per_kv
    q, out = weights.q.copy(), weights.out.copy()
    keys, values = [], []
    for group in range(kv_heads):
        kv_rows = slice(group * size * dim, (group + 1) * size * dim)
        q_rows = slice(group * size * per * dim, (group + 1) * size * per * dim)
        shared, maps = _shared_values(weights, kv_rows, q_rows)
        values.append(shared)
        for head in range(size * per):
            columns = slice(q_rows.start + head * dim, q_rows.start + (head + 1) * dim)
            out[:, columns] = weights.out[:, columns] @ maps[head // per]
        if not weights.rotated:
            keys.append(weights.k[kv_rows].reshape(size, dim, -1).mean(0))
            continue
        shared, turns = _shared_keys(weights, kv_rows, q_rows)
        keys.append(shared)
        queries = _complex(weights.q[q_rows], size * per, dim)
        queries *= np.repeat(turns, per, axis=0).conj()[:, :, None]
        q[q_rows] = _real(queries)
    return replace(
        weights, q=q, out=out, k=np.concatenate(keys), v=np.concatenate(values),
        num_kv_heads=kv_heads,
    )  # fmt: skip


def _shared_values(
    weights: AttentionWeights, kv_rows: slice, q_rows: slice
) -> tuple[np.ndarray, np.ndarray]:
    """One value head ``[dim, hidden + 1]`` and each head's map ``[heads, dim, dim]`` from it, so
    that ``maps[h] @ shared`` is nearest to head h, heads weighted by what the output reads of
    them."""
    dim = weights.head_dim
    stacked = weights.v[kv_rows].reshape(-1, dim, weights.v.shape[1])
    size = len(stacked)
    read = weights.out[:, q_rows].reshape(weights.out.shape[0], size, -1)
    importance = _above_zero(np.sqrt(np.square(read).sum((0, 2))))
    scaled = stacked * importance[:, None, None] * weights.inputs
    left, values, right = np.linalg.svd(scaled.reshape(size * dim, -1), full_matrices=False)
    rank = min(dim, len(values))
    maps = np.zeros((size, dim, dim))
    shared = np.zeros((dim, stacked.shape[2]))
    # The whole of the size goes to the head, so that the maps of equal heads are rotations.
    unit = float(np.sqrt(np.square(importance).sum()))
    maps[:, :, :rank] = left[:, :rank].reshape(size, dim, rank) * unit
    maps /= importance[:, None, None]
    shared[:rank] = values[:rank, None] * right[:rank] / unit / _above_zero(weights.inputs)
    return shared, maps


def _shared_keys(
    weights: AttentionWeights, kv_rows: slice, q_rows: slice
) -> tuple[np.ndarray, np.ndarray]:
    """One key head and each head's factors, complex ``[heads, dim / 2]``: a pair of rotated
    channels ``(j, j + dim / 2)`` is one complex number, which the rotary embedding multiplies by
    ``exp(i angle)``; factors commute with that."""
    dim, columns = weights.head_dim, weights.k.shape[1]
    size = (kv_rows.stop - kv_rows.start) // dim
    pairs = _complex(weights.k[kv_rows], size, dim)  # [heads, dim / 2, columns]
    read = _complex(weights.q[q_rows], size, -1, weights.queries_per_kv, dim)
    importance = _above_zero(np.sqrt((np.abs(read * weights.inputs) ** 2).sum((1, 3))))
    scaled = pairs * importance[:, :, None] * weights.inputs
    left, values, right = np.linalg.svd(scaled.transpose(1, 0, 2), full_matrices=False)
    unit = np.sqrt(np.square(importance).sum(0))  # [dim / 2]
    turns = left[:, :, 0].T * unit / importance
    shared = values[:, :1] * right[:, 0] / unit[:, None] / _above_zero(weights.inputs)
    return _real(shared.reshape(1, dim // 2, columns)), turns


def _complex(
    rows: np.ndarray, heads: int, dim: int, per: int | None = None, head_dim: int = 0
) -> np.ndarray:
    """``[heads * dim, n]`` to complex ``[heads, dim / 2, n]``; with ``per`` query heads of each,
    ``[heads, per, head_dim / 2, n]``."""
    if per is not None:
        split = rows.reshape(heads, per, 2, head_dim // 2, -1)
        return split[:, :, 0] + 1j * split[:, :, 1]
    split = rows.reshape(heads, 2, dim // 2, -1)
    return split[:, 0] + 1j * split[:, 1]


def _real(pairs: np.ndarray) -> np.ndarray:
    return np.stack([pairs.real, pairs.imag], axis=1).reshape(-1, pairs.shape[-1])


def _above_zero(values: np.ndarray) -> np.ndarray:
    """Magnitudes that can be divided by."""
    sizes = np.abs(values)
    return np.maximum(sizes, 1e-6 * max(float(sizes.max(initial=0)), 1e-30))


# -- which heads share -------------------------------------------------------------------------
def pair_costs(weights: AttentionWeights, pooling: str) -> np.ndarray:
    """What pooling two KV heads would lose, ``[kv_heads, kv_heads]``: the share of the energy of
    both heads' keys that is lost, and that of their values."""
    count, dim = weights.num_kv_heads, weights.head_dim
    costs = np.zeros((count, count))
    parts = [
        (part * weights.inputs).reshape(count, dim, -1) for part in (weights.k, weights.v)
    ]
    for a in range(count):
        for b in range(a + 1, count):
            for part, turned in zip(parts, (weights.rotated, True), strict=True):
                pair = part[[a, b]]
                energy = max(float(np.square(pair).sum()), 1e-300)
                if pooling != "svd" or not turned:
                    lost = float(np.square(pair[0] - pair[1]).sum()) / 2
                elif part is parts[1]:
                    values = np.linalg.svd(pair.reshape(2 * dim, -1), compute_uv=False)
                    lost = float(np.square(values[dim:]).sum())
                else:
                    stacked = _complex(pair.reshape(2 * dim, -1), 2, dim).transpose(1, 0, 2)
                    values = np.linalg.svd(stacked, compute_uv=False)
                    lost = float(np.square(values[:, 1:]).sum())
                costs[a, b] += lost / energy
    return costs + costs.T


def balanced_groups(costs: np.ndarray, size: int) -> list[list[int]]:
    """Groups of ``size`` whose costs within are small: from consecutive ones, two heads change
    places as long as the best such change saves something."""
    count = len(costs)
    group = np.arange(count) // size
    while True:
        member = np.eye(count // size)[group]  # [heads, groups]
        to_group = costs @ member
        own = to_group[np.arange(count), group]
        moved = to_group[:, group]  # of head a beside the group of head b
        saved = own[:, None] + own[None] - moved - moved.T + 2 * costs
        saved[group[:, None] == group[None]] = 0
        a, b = np.unravel_index(np.argmax(saved), saved.shape)
        if saved[a, b] <= 1e-12:
            break
        group[a], group[b] = group[b], group[a]
    found = [np.flatnonzero(group == g).tolist() for g in range(count // size)]
    return sorted(found)
