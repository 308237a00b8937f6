"""What the built-in caches do in particular: sharing, waiting, eviction, windows, the split."""

from __future__ import annotations

import numpy as np
import pytest

from pyllmlite.core.errors import CapacityError
from pyllmlite.hooks.cache import CacheNeeds, KVGroup
from pyllmlite.hooks.registry import Registry
from pyllmlite.testing.cache import needs_for
from pyllmlite_plugins.cache.contiguous import Contiguous
from pyllmlite_plugins.cache.paged import Paged
from pyllmlite_plugins.cache.paged_int8 import PagedInt8
from pyllmlite_plugins.cache.plan import Kept, split

BLOCK = 16


def paged(blocks=20, windows=(None,), **changes):
    return Paged(needs_for(windows, blocks * BLOCK, **changes))


def prefill(cache, seq_id, row, tokens, salt=0):
    hit = cache.acquire(seq_id, row, tokens, salt)
    assert hit is not None
    assert cache.reserve(seq_id, len(tokens))
    cache.commit(seq_id, tokens, len(tokens))
    return hit


def test_full_blocks_of_a_prefix_are_shared():
    cache = paged()
    tokens = list(range(40))
    assert prefill(cache, 1, 0, tokens) == 0
    assert cache.acquire(2, 1, tokens[:37] + [9, 9]) == 32
    table = cache.block_tables[0]
    assert (table[0, :2] == table[1, :2]).all() and table[1, 2] == -1
    assert cache.stats()["hit_tokens"] == 32 and cache.stats()["query_tokens"] == 79


@pytest.mark.parametrize("length, hit", [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (40, 32)])
def test_the_last_token_always_runs(length, hit):
    cache = paged()
    tokens = list(range(40))
    prefill(cache, 1, 0, tokens)
    assert cache.acquire(2, 1, tokens[:length]) == hit


def test_a_prefix_outlives_its_request_until_memory_is_needed():
    cache = paged(blocks=6)
    first, second = list(range(48)), list(range(100, 148))
    prefill(cache, 1, 0, first)
    cache.free(1)
    assert cache.num_free_blocks == 6
    prefill(cache, 2, 0, second)
    cache.free(2)
    # Six blocks are cached; the two that a newcomer takes are the oldest prefix's last ones.
    prefill(cache, 3, 0, [7] * 30)
    cache.free(3)
    assert cache.acquire(4, 0, second) == 32
    assert cache.acquire(5, 1, first) == 16
    assert cache.stats()["evictions"] == 2


def test_reset_forgets_what_nobody_holds():
    cache = paged()
    tokens = list(range(40))
    prefill(cache, 1, 0, tokens)
    cache.reset_prefix_cache()
    assert cache.acquire(2, 1, tokens) == 32
    cache.free(1)
    cache.free(2)
    cache.reset_prefix_cache()
    assert cache.acquire(3, 0, tokens) == 0


def test_generated_tokens_are_found_by_the_next_turn():
    cache = paged()
    tokens = list(range(20))
    prefill(cache, 1, 0, tokens)
    for token in range(100, 120):
        tokens.append(token)
        assert cache.reserve(1, len(tokens))
        cache.commit(1, tokens, len(tokens))
    cache.free(1)
    assert cache.acquire(2, 0, [*tokens, 5]) == 32


def test_without_prefix_caching_nothing_is_shared():
    cache = paged(prefix_caching=False)
    tokens = list(range(40))
    prefill(cache, 1, 0, tokens)
    assert cache.acquire(2, 1, tokens) == 0
    cache.free(1)
    cache.free(2)
    assert cache.acquire(3, 0, tokens) == 0


def test_waits_for_a_prefix_in_flight_while_it_pays():
    cache = paged()
    tokens = list(range(100))
    assert cache.acquire(1, 0, tokens) == 0
    assert cache.acquire(2, 1, [*tokens[:90], 7]) is None
    assert cache.stats()["waits"] == 1
    # Only 16 of 100 tokens in common: that is not worth a step.
    other = tokens[:16] + [7] * 84
    assert cache.acquire(3, 1, other) == 0
    cache.reserve(1, 64)
    cache.commit(1, tokens, 64)
    # 64 of 91 are there and 16 more will be; it goes on waiting, then takes both.
    assert cache.acquire(2, 2, [*tokens[:90], 7]) is None
    cache.reserve(1, 100)
    cache.commit(1, tokens, 100)
    assert cache.acquire(2, 2, [*tokens[:90], 7]) == 80
    cache.check_integrity()


def test_whoever_waits_goes_on_when_the_other_is_preempted():
    cache = paged()
    tokens = list(range(100))
    cache.acquire(1, 0, tokens)
    cache.reserve(1, 32)
    cache.commit(1, tokens, 32)
    assert cache.acquire(2, 1, tokens) is None
    cache.free(1)
    assert cache.acquire(2, 1, tokens) == 32
    # And now the first one waits for the second.
    assert cache.acquire(1, 0, tokens) is None
    cache.free(2)
    assert cache.acquire(1, 0, tokens) == 32
    cache.check_integrity()


def test_a_hit_counts_only_if_the_sequence_ran():
    cache = paged(blocks=4)
    tokens = list(range(40))
    prefill(cache, 1, 0, tokens)
    for _ in range(3):
        assert cache.acquire(2, 1, tokens[:39] + [5] * 30) == 32
        assert not cache.reserve(2, 69)
        cache.free(2)
    assert cache.stats()["hit_tokens"] == 0 and cache.stats()["query_tokens"] == 40


def test_fork_copies_the_block_that_is_written():
    cache = paged()
    tokens = list(range(20))
    prefill(cache, 1, 0, tokens)
    cache.fork(1, 2, 1)
    table = cache.block_tables[0]
    assert (table[0] == table[1]).all()
    old = int(table[0, 1])
    assert cache.blocks_needed(2, 21) == 1
    assert cache.reserve(2, 21)
    new = int(table[1, 1])
    assert cache.take_copies(0) == [(old, new)] and cache.take_copies(0) == []
    assert cache.reserve(1, 21)  # alone on its block now
    assert cache.take_copies(0) == [] and table[0, 1] == old
    cache.check_integrity()


def test_completions_that_run_the_last_prompt_token_again():
    """n > 1: the child goes back by one token, across a block's edge and with a window."""
    for length in (32, 33, 48):
        cache = paged(windows=(None, 17))
        tokens = list(range(length))
        prefill(cache, 1, 0, tokens)
        cache.fork(1, 2, 1)
        cache.truncate(2, length - 1)
        assert cache.reserve(2, length)
        cache.commit(2, tokens, length)
        cache.check_integrity()


def test_windows_free_what_fell_out():
    cache = paged(windows=(None, 20), blocks=40)
    tokens = list(range(100))
    prefill(cache, 1, 0, tokens)
    full, window = cache.block_tables
    assert (full[0, :7] >= 0).all()
    # Token 100 sees positions 81..: block 5 on; one block more is kept.
    assert (window[0, :4] == -1).all() and (window[0, 4:7] >= 0).all()
    with pytest.raises(ValueError, match="window is no longer held"):
        cache.truncate(1, 60)
    cache.check_integrity()


def test_windows_need_only_the_windows_blocks_for_a_hit():
    cache = paged(windows=(20,), blocks=8)
    tokens = list(range(100))
    prefill(cache, 1, 0, tokens[:64])
    assert cache.reserve(1, 100)
    cache.commit(1, tokens, 100)
    cache.free(1)
    assert cache.acquire(2, 0, [*tokens, 1]) == 96
    assert (cache.block_tables[0][0, :4] == -1).all()
    assert (cache.block_tables[0][0, 4:6] >= 0).all()


def test_the_tokens_are_compared_not_only_their_hash():
    # hash(-1) == hash(-2) in CPython, so these blocks collide.
    cache = paged()
    one, two = [-1] * 20, [-2] * 20
    assert hash(tuple(one[:16])) == hash(tuple(two[:16]))
    prefill(cache, 1, 0, one)
    assert cache.acquire(2, 1, two) == 0


def test_errors():
    cache = paged()
    cache.acquire(1, 0, [1, 2, 3])
    with pytest.raises(ValueError, match="already"):
        cache.acquire(1, 1, [1])
    with pytest.raises(ValueError, match="max_model_len"):
        cache.reserve(1, 1000)
    with pytest.raises(CapacityError, match="one block of 16 tokens"):
        paged(blocks=0)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"device": "cuda"}, "on the CPU"),
        ({"kv_dtype": "fp8"}, "not kv_dtype 'fp8'"),
        ({"block_size": 24}, "multiple of 16"),
        ({"block_size": -16}, "multiple of 16"),
    ],
)
def test_what_is_not_supported_is_said(changes, reason):
    assert reason in Paged.supports(needs_for((None,), 100, **changes))


def test_dtype_and_block_size():
    assert Paged(needs_for((None,), 100)).kv_dtype == "f32"
    assert Paged(needs_for((None,), 100, dtype="bf16")).kv_dtype == "bf16"
    assert Paged(needs_for((None,), 100, kv_dtype="bf16")).kv_dtype == "bf16"
    half = Paged(needs_for((None,), 320, kv_dtype="bf16"))
    assert half.num_blocks == 40 and half.nbytes == Paged(needs_for((None,), 320)).nbytes
    assert Paged(needs_for((None,), 320, block_size=64)).num_blocks == 5
    assert "cannot be chosen" in Contiguous.supports(needs_for((None,), 100, block_size=16))


def test_int8_counts_its_scales():
    for head_dim, token in ((64, 2 * 2 * (64 + 4)), (18, 2 * (20 + 18 + 8))):
        changes = {"num_kv_heads": 2, "head_dim": head_dim, "max_model_len": 256}
        needs = needs_for((None, 20), 320, max_bytes=2 * 320 * token, **changes)
        cache = PagedInt8(needs)
        assert cache.kv_dtype == "int8" and cache.layout == "paged-int8"
        assert cache.nbytes <= needs.max_bytes
        assert cache.nbytes + 2 * 16 * token * 2 > needs.max_bytes
    reason = PagedInt8.supports(needs_for((None,), 100, kv_dtype="bf16"))
    assert reason == "stores int8, not kv_dtype 'bf16'"
    assert "multiple of 16" in PagedInt8.supports(needs_for((None,), 100, block_size=8))


def test_int8_is_chosen_by_name_or_dtype_and_never_by_itself():
    registry = Registry.load()
    assert registry.select("cache", "auto", needs_for((None,), 320)).cls is Paged
    by_dtype = registry.select("cache", "auto", needs_for((None,), 320, kv_dtype="int8"))
    assert by_dtype.cls is PagedInt8
    assert registry.select("cache", "paged-int8", needs_for((None,), 320)).cls is PagedInt8


def test_int8_tensors():
    arrays = {}

    class Sink:
        def tensor(self, name, array, dtype=None):
            arrays[name] = (array, dtype)
            return name

    needs = needs_for((None,), 320, num_kv_heads=2, head_dim=18, max_bytes=100_000)
    (view,) = PagedInt8(needs).add_tensors(Sink())
    assert view.extra == {"scales": "layers.0.scales_cache"} and view.dtype == "int8"
    blocks = view.num_blocks
    k, v, scales = (arrays[name] for name in (view.k, view.v, view.extra["scales"]))
    assert k[0].shape == (blocks, 2, 5, 64) and k[1] == "int8"
    assert v[0].shape == (blocks, 2, 4, 72) and v[1] == "int8"
    assert scales[0].shape == (blocks, 2, 2, 16) and scales[1] == "f32"
    assert all(array.ctypes.data % 64 == 0 for array, _ in arrays.values())


def test_contiguous_has_one_block_a_row():
    cache = Contiguous(needs_for((None,), 10_000, max_rows=3, max_model_len=100))
    assert cache.block_size == 112 and cache.num_blocks == 3
    assert [table.shape for table in cache.block_tables] == [(3, 1)]
    prefill(cache, 1, 0, list(range(40)))
    assert cache.acquire(2, 1, list(range(40))) == 0
    cache.fork(1, 3, 2)
    assert cache.reserve(3, 41)
    assert len(cache.take_copies(0)) == 1
    assert cache.reserve(1, 100) and cache.take_copies(0) == []
    with pytest.raises(CapacityError, match="raise kv_cache_memory"):
        Contiguous(needs_for((None,), 50, max_model_len=100))


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("max_bytes", [3_000, 50_000, 10**6, 10**8])
def test_split_spends_what_it_is_given(rows, max_bytes):
    kept_of, sizes = (Kept(None), Kept(512)), [1000, 5000]
    try:
        blocks = split(kept_of, sizes, 16, max_bytes, 4096, rows, 256, True)
    except CapacityError:
        assert max_bytes < sum(sizes)
        return
    spent = sum(n * size for n, size in zip(blocks, sizes, strict=True))
    assert spent <= max_bytes and max_bytes - spent <= 2 * sum(sizes)
    if max_bytes >= 10**8:  # then both groups hold the same number of long sequences
        full, window = blocks[0] / 256, blocks[1] / (32 + 2)
        assert abs(full - window) < 2
    kept = split(kept_of, sizes, 16, max_bytes, 4096, rows, 256, False)
    assert kept[0] <= 256 * rows and kept[1] <= 34 * rows + 16


def test_slots_fit_into_32_bits():
    blocks = split([Kept(None)], [1], 16, 2**40, 2**20, 4, 256, True)
    assert blocks[0] * 16 < 2**31


def test_tensors_are_aligned_and_in_layer_order():
    class Sink:
        def tensor(self, name, array, dtype=None):
            return (name, array, dtype)

    needs = CacheNeeds(
        "cpu", "bf16", (KVGroup((0, 2), 20), KVGroup((1,), None)), 3, 2, 8, 256, 4, 64, 200_000
    )
    cache = Paged(needs)
    views = cache.add_tensors(Sink())
    assert [view.group for view in views] == [0, 1, 0]
    assert [view.k[0] for view in views] == [f"layers.{i}.k_cache" for i in range(3)]
    for view in views:
        _, k, dtype = view.k
        _, v, _ = view.v
        assert k.shape == (view.num_blocks, 2, 8, 16) and v.shape == (view.num_blocks, 2, 16, 8)
        assert k.dtype == np.uint16 and dtype == view.dtype == "bf16"
        assert k.ctypes.data % 64 == v.ctypes.data % 64 == 0
        assert view.layout == "paged-kt" and not k.any()
    total = sum(view.k[1].nbytes + view.v[1].nbytes for view in views)
    assert total == cache.nbytes <= 200_000
