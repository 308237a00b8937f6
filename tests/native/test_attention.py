"""Rotary, store and attention on the paged cache, against torch's attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyllmlite.runtime.native import native
from pyllmlite_plugins.layout import gather, quantize

BLOCK = 16
LENGTHS = (90, 1, 300)


def bf16_bits(x):
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


class World:
    """Sequences with their q, k and v, and a paged cache for them in shuffled blocks."""

    def __init__(self, heads, kv_heads, head_dim, dtype="f32", lengths=LENGTHS, seed=0):
        rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, head_dim, dtype
        self.lengths = lengths
        width = (heads + 2 * kv_heads) * head_dim
        self.qkv = [rng.standard_normal((n, width), dtype=np.float32) for n in lengths]
        columns = -(-max(lengths) // BLOCK)
        self.table = np.full((len(lengths), columns), -1, np.int32)
        num_blocks = len(lengths) * columns
        order = rng.permutation(num_blocks)
        for row, n in enumerate(lengths):
            used = -(-n // BLOCK)
            self.table[row, :used] = order[row * columns : row * columns + used]
        # What nobody wrote is NaN.
        if dtype == "int8":
            quads = -(-head_dim // 4)
            k = np.full((num_blocks, kv_heads, quads, BLOCK * 4), -128, np.int8)
            v = np.full((num_blocks, kv_heads, BLOCK // 4, head_dim * 4), 127, np.int8)
            scales = np.full((num_blocks, kv_heads, 2, BLOCK), np.nan, np.float32)
            self.caches = [k, v, scales]
        else:
            kind, fill = (np.uint16, 0x7FC0) if dtype == "bf16" else (np.float32, np.nan)
            k = np.full((num_blocks, kv_heads, head_dim, BLOCK), fill, kind)
            v = np.full((num_blocks, kv_heads, BLOCK, head_dim), fill, kind)
            self.caches = [k, v]
        self.layout = native().KVLayout(dtype, num_blocks, kv_heads, head_dim, BLOCK)
        self.batch = native().Batch(
            len(lengths), max(lengths), sum(lengths), 8, 100, 1, [(BLOCK, self.table)]
        )

    def step(self, spans, threads=1, rotary=None, **options):
        """``spans``: (sequence, begin, end).  Stores and attends; returns the rows of each."""
        rows = [s for s, _, _ in spans]
        self.batch.set_step(
            rows, [b for _, b, _ in spans], [e - b for _, b, e in spans], [0] * len(spans)
        )
        qkv = np.concatenate([self.qkv[s][b:e] for s, b, e in spans])
        out = np.empty((len(qkv), self.heads * self.head_dim), np.float32)
        store = native().rotary_store(self.heads, self.layout, **(rotary or {}))
        native().run_op(store, [qkv, *self.caches], self.batch, threads)
        options.setdefault("scale", self.head_dim**-0.5)
        attention = native().attention(self.heads, self.layout, **options)
        native().run_op(attention, [qkv, out, *self.caches], self.batch, threads)
        return np.split(out, np.cumsum([e - b for _, b, e in spans])[:-1])

    def whole(self, **options):
        return self.step([(s, 0, n) for s, n in enumerate(self.lengths)], **options)

    def parts(self, s):
        """q, k, v of a sequence as torch [heads, tokens, head_dim]; k and v as they are stored."""
        n, dim = self.lengths[s], self.head_dim
        q, k, v = np.split(
            self.qkv[s], [self.heads * dim, (self.heads + self.kv_heads) * dim], axis=1
        )
        q, k, v = (torch.from_numpy(x).view(n, -1, dim).transpose(0, 1) for x in (q, k, v))
        if self.dtype == "bf16":
            k, v = k.bfloat16().float(), v.bfloat16().float()
        elif self.dtype == "int8":
            k, v = (dequantized(x.numpy()) for x in (k, v))
        return q, k, v


def dequantized(x):
    codes, scales = quantize(x)
    return torch.from_numpy(codes * scales[..., None])


def tolerance(dtype):
    """bf16 dot products round queries and probabilities, each by up to 2^-9 of itself; with int8
    they have 16 bits of the largest of a row."""
    if dtype == "int8":
        return 4e-4
    return 1e-2 if dtype == "bf16" and native().info()["isa"] == "avx512_bf16" else 2e-6


def visible(n, window=0):
    at = torch.arange(n)
    distance = at[:, None] - at[None, :]
    mask = distance >= 0
    return mask & (distance < window) if window else mask


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(4, 4, 64), (9, 3, 64), (8, 1, 20), (2, 2, 8)]
)
@pytest.mark.parametrize("window", [0, 1, 50])
def test_like_torch(heads, kv_heads, head_dim, dtype, window):
    world = World(heads, kv_heads, head_dim, dtype)
    for s, out in enumerate(world.whole(window=window)):
        q, k, v = world.parts(s)
        want = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=visible(world.lengths[s], window), enable_gqa=True
        )[0]
        want = want.transpose(0, 1).reshape(out.shape)
        np.testing.assert_allclose(out, want, rtol=0, atol=tolerance(dtype))
        # Rounding has no direction: on the whole it is far smaller than at its worst.
        assert ((out - want.numpy()) ** 2).mean() ** 0.5 < tolerance(dtype) / 5


def test_alibi_and_softcap():
    world = World(6, 2, 32)
    slopes = np.array([0.5**i for i in range(1, 7)], np.float32)
    outs = world.whole(alibi_slopes=slopes, softcap=3.0)
    for s, out in enumerate(outs):
        q, k, v = world.parts(s)
        k, v = (x.repeat_interleave(3, 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * 32**-0.5
        scores = 3 * torch.tanh(scores / 3)
        at = torch.arange(world.lengths[s])
        scores += torch.from_numpy(slopes)[:, None, None] * (at[None, :] - at[:, None])
        scores.masked_fill_(~visible(world.lengths[s]), -torch.inf)
        want = (scores.softmax(-1) @ v).transpose(0, 1).reshape(out.shape)
        np.testing.assert_allclose(out, want, rtol=0, atol=2e-6)


def test_rotary_norm_and_store():
    world = World(4, 2, 24)
    rotary_dim, positions = 16, max(LENGTHS)
    angles = np.arange(positions)[:, None] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    rng = np.random.default_rng(1)
    q_norm, k_norm = (rng.standard_normal(24, dtype=np.float32) for _ in range(2))
    rotary = {"rotary_dim": rotary_dim, "cos": cos, "sin": sin}
    rotary |= {"q_norm": q_norm, "k_norm": k_norm}
    for s, out in enumerate(world.whole(rotary=rotary)):
        q, k, v = world.parts(s)
        n, half = world.lengths[s], rotary_dim // 2

        def turned(x, weight, n=n, half=half):
            x = F.rms_norm(x, (24,), torch.from_numpy(weight), 1e-6)
            a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            c, d = torch.from_numpy(cos[:n]), torch.from_numpy(sin[:n])
            return torch.cat([a * c - b * d, b * c + a * d, rest], -1)

        want = F.scaled_dot_product_attention(
            turned(q, q_norm)[None], turned(k, k_norm)[None], v[None], is_causal=True,
            enable_gqa=True,
        )[0]
        np.testing.assert_allclose(out, want.transpose(0, 1).reshape(out.shape), atol=3e-6)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
def test_a_row_has_the_same_bits_however_it_is_run(dtype):
    world = World(6, 2, 64, dtype)
    whole = world.whole()
    chunked = World(6, 2, 64, dtype)
    for begin in range(0, 300, 70):
        end = min(300, begin + 70)
        spans = [(2, begin, end)] + ([(0, begin, end)] if end <= 90 else [])
        outs = chunked.step(spans, threads=2)
        assert (outs[0] == whole[2][begin:end]).all()
    for n in range(290, 300):
        assert (chunked.step([(2, n, n + 1)])[0] == whole[2][n]).all()
        assert (chunked.step([(2, n, n + 1)], threads=2)[0] == whole[2][n]).all()


def test_positions_past_the_tables_are_refused():
    world = World(2, 2, 8)
    table = np.zeros((20, 4), np.float32)
    with pytest.raises(RuntimeError, match="position 89, but the tables hold 20"):
        world.step([(0, 0, 90)], rotary={"rotary_dim": 8, "cos": table, "sin": table})


@pytest.mark.parametrize("head_dim", [1, 6, 64, 80])
def test_int8_codes_and_scales(head_dim):
    """The stored codes are the reference's, rotation or none, also of zeros and tiny vectors."""
    world = World(2, 2, head_dim, "int8")
    _, k, v = (2 * head_dim * i for i in range(3))
    world.qkv[0][3, k:] = 0
    world.qkv[0][4, k:] = 1e-35
    world.qkv[0][5, v + 1 :] *= 1e20
    world.qkv[0][6, v:] = np.copysign(0.7, world.qkv[0][6, v:])
    world.whole()
    for s, n in enumerate(world.lengths):
        keys, values = gather(tuple(world.caches), world.table[s], BLOCK, head_dim, 0, n)
        for got, first in ((keys, k), (values, v)):
            codes, scales = quantize(world.qkv[s][:, first : first + k].reshape(n, 2, head_dim))
            np.testing.assert_array_equal(got, codes * scales[..., None].astype(np.float64))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["key", "value"])
def test_int8_keeps_what_is_not_finite_to_its_own_rows(bad, where):
    clean, dirty = World(4, 2, 32, "int8"), World(4, 2, 32, "int8")
    column = 4 * 32 + (2 * 32 if where == "value" else 0) + 5  # KV head 0
    dirty.qkv[2][200, column] = bad
    for before, after in zip(clean.whole(), dirty.whole(), strict=True):
        bad_rows = np.isnan(after)
        assert (before == after)[~bad_rows].all()
        if len(after) < 300:
            assert not bad_rows.any()
        else:  # heads 0 and 1 from position 200 on, and nothing else
            assert bad_rows[200:, :64].all()
            assert not bad_rows[:200].any() and not bad_rows[:, 64:].any()


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("window", [0, 33])
def test_alibi_softcap_and_window_in_every_dtype(dtype, window):
    world = World(6, 2, 20, dtype)
    slopes = np.array([0.5**i for i in range(1, 7)], np.float32)
    for s, out in enumerate(world.whole(alibi_slopes=slopes, softcap=2.0, window=window)):
        q, k, v = world.parts(s)
        k, v = (x.repeat_interleave(3, 0) for x in (k, v))
        scores = 2 * torch.tanh(q @ k.transpose(1, 2) * 20**-0.5 / 2)
        at = torch.arange(world.lengths[s])
        scores += torch.from_numpy(slopes)[:, None, None] * (at[None, :] - at[:, None])
        scores.masked_fill_(~visible(world.lengths[s], window), -torch.inf)
        want = (scores.softmax(-1) @ v).transpose(0, 1).reshape(out.shape)
        np.testing.assert_allclose(out, want, rtol=0, atol=2 * tolerance(dtype))


def test_int8_takes_its_scales():
    world = World(2, 2, 8, "int8")
    world.caches.pop()
    with pytest.raises(ValueError, match="it takes 4 buffers, got 3"):
        world.whole()
    with pytest.raises(ValueError, match="f32, bf16 or int8, not f16"):
        native().KVLayout("f16", 4, 2, 8, BLOCK)
