"""The suite for caches: random histories against a plain model of what must be readable.

The model follows every slot: which tokens, behind which prefix, were last written or copied
into it.  After each step every sequence must find at each position that its next token sees
exactly what it computed, or what another sequence computed for the same tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyllmlite.core.errors import CapacityError
from pyllmlite.hooks.cache import CacheNeeds, KVGroup
from pyllmlite.testing.base import Conformance
from pyllmlite.testing.native_step import HeadShape, check_against_dense

HEAD_DIM = 4
TOKEN_BYTES = 2 * HEAD_DIM * 4  # K and V of one float32 head, one layer


def needs_for(
    windows: Sequence[int | None],
    num_tokens: int,
    max_rows: int = 8,
    sinks: int = 0,
    **changes: Any,
) -> CacheNeeds:
    """A cache with one layer a window (beside it ``sinks``), and memory for about ``num_tokens``
    tokens in each."""
    arguments: dict[str, Any] = {
        "device": "cpu",
        "dtype": "f32",
        "groups": tuple(
            KVGroup((i,), window, 0 if window is None else sinks)
            for i, window in enumerate(windows)
        ),
        "num_layers": len(windows),
        "num_kv_heads": 1,
        "head_dim": HEAD_DIM,
        "max_model_len": 128,
        "max_rows": max_rows,
        "max_num_batched_tokens": 64,
        "max_bytes": num_tokens * TOKEN_BYTES * len(windows),
    }
    return CacheNeeds(**(arguments | changes))


@dataclass
class Line:
    """A sequence as the model sees it.  ``history[p]``: stands for tokens 0..p and the salt."""

    tokens: list[int]
    salt: int
    history: list[int] = field(default_factory=list)
    row: int = -1
    computed: int = 0
    hit: int = 0

    def extend(self, token: int) -> None:
        self.tokens.append(token)
        self.history.append(hash((self.history[-1] if self.history else self.salt, token)))

    def copy(self, row: int) -> Line:
        history = list(self.history)
        return Line(list(self.tokens), self.salt, history, row, self.computed, self.hit)


class CacheModel:
    """Drives a cache as the engine does and checks every read."""

    def __init__(self, cache: Any, needs: CacheNeeds, seed: int) -> None:
        self.cache = cache
        self.needs = needs
        self.rng = random.Random(seed)
        self.slots: list[dict[int, int]] = [{} for _ in needs.groups]
        self.live: dict[int, Line] = {}
        self.waiting: list[Line] = []
        self.swapped: dict[int, Line] = {}
        self.free_rows = list(range(needs.max_rows))
        self.next_id = 0
        self.refused = 0  # steps in which somebody found no room
        self._starts = [self._beginning() for _ in range(3)]

    def _beginning(self) -> list[int]:
        """What prompts have in common."""
        return [self.rng.randint(0, 9) for _ in range(70)]

    # -- what may happen -----------------------------------------------------------------------
    def arrive(self) -> None:
        line = Line([], self.rng.choice([0, 0, 0, 1]))
        if self.rng.random() < 0.2:
            self._starts[self.rng.randrange(3)] = self._beginning()
        start = self.rng.choice(self._starts)
        for token in start[: self.rng.randint(0, 70)]:
            line.extend(token)
        for _ in range(self.rng.randint(1, 20)):
            line.extend(self.rng.randint(0, 9))
        self.waiting.append(line)

    def start(self) -> None:
        if not self.waiting or not self.free_rows:
            return
        line = self.waiting[0]
        row, seq_id = self.free_rows[-1], self.next_id
        hit = self.cache.acquire(seq_id, row, line.tokens, line.salt)
        if hit is None:
            assert self.live, "acquire waits for a prefix in flight, and nobody is in flight"
            self.waiting.append(self.waiting.pop(0))
            return
        assert 0 <= hit < len(line.tokens), f"acquire returned {hit} of {len(line.tokens)} tokens"
        self.next_id += 1
        self.waiting.pop(0)
        self.free_rows.pop()
        line.row, line.computed, line.hit = row, hit, hit
        self.live[seq_id] = line

    def leave(self, again: bool) -> None:
        if not self.live:
            return
        seq_id = self.rng.choice(list(self.live))
        line = self.live.pop(seq_id)
        self.cache.free(seq_id)
        self.free_rows.append(line.row)
        if again:
            line.row, line.computed = -1, 0
            self.waiting.insert(0, line)

    def fork(self) -> None:
        ready = [i for i, line in self.live.items() if line.computed >= len(line.tokens) - 1 > 0]
        if not ready or not self.free_rows:
            return
        parent_id = self.rng.choice(ready)
        child = self.live[parent_id].copy(self.free_rows.pop())
        self.cache.fork(parent_id, self.next_id, child.row)
        if self.rng.random() < 0.3 and child.computed > child.hit:  # its last token runs once more
            child.computed -= 1
            self.cache.truncate(self.next_id, child.computed)
        self.live[self.next_id] = child
        self.next_id += 1

    def truncate(self) -> None:
        """A step is rolled back: at most the last few tokens are forgotten."""
        ready = [i for i, line in self.live.items() if line.computed == len(line.tokens) > 8]
        if not ready:
            return
        seq_id = self.rng.choice(ready)
        line = self.live[seq_id]
        line.computed = max(line.hit, line.computed - self.rng.randint(1, 3))
        self.cache.truncate(seq_id, line.computed)

    def step(self) -> None:
        """Some sequences run: prefill in chunks, decode, or verify drafts that are rejected."""
        cache, rng = self.cache, self.rng
        put: list[tuple[int, int]] = []
        for seq_id in rng.sample(list(self.live), rng.randint(0, len(self.live))):
            line = self.live[seq_id]
            if line.computed == len(line.tokens):
                if len(line.tokens) >= self.needs.max_model_len:
                    continue
                line.extend(rng.randint(0, 9))
            behind = len(line.tokens) - line.computed
            target = line.computed + min(behind, rng.choice([1, 7, 16, 40]))
            if self._reserve(seq_id, target):
                put.append((seq_id, target))
        if put and rng.random() < 0.1:  # one that was put in is preempted after all
            seq_id, _ = put.pop(rng.randrange(len(put)))
            line = self.live.pop(seq_id)
            cache.free(seq_id)
            self.free_rows.append(line.row)
            line.row, line.computed = -1, 0
            self.waiting.insert(0, line)
        self._copy()
        for seq_id, target in put:
            self._write(self.live[seq_id], target)
        for seq_id, target in put:
            self._read(self.live[seq_id], target)
        for seq_id, target in put:
            line = self.live[seq_id]
            drafts = rng.choice([0, 0, 0, 3])
            if drafts and target + drafts <= self.needs.max_model_len:
                # Room for drafts that were all rejected.
                if cache.reserve(seq_id, target + drafts):
                    cache.commit(seq_id, line.tokens, target)
                    cache.truncate(seq_id, target)
                else:
                    cache.commit(seq_id, line.tokens, target)
            else:
                cache.commit(seq_id, line.tokens, target)
            line.computed = target

    def _reserve(self, seq_id: int, target: int) -> bool:
        cache = self.cache
        before = [table.copy() for table in cache.block_tables]
        free = cache.num_free_blocks
        enough = cache.blocks_needed(seq_id, target) <= free
        if cache.reserve(seq_id, target):
            return True
        self.refused += 1
        assert not enough, "reserve failed although the blocks that it needs are free"
        assert cache.num_free_blocks == free, "a reserve that failed took blocks"
        for old, table in zip(before, cache.block_tables, strict=True):
            assert (old == table).all(), "a reserve that failed changed a block table"
        return False

    def _slot(self, group: int, row: int, position: int) -> int:
        size = self.cache.block_size
        block = int(self.cache.block_tables[group][row, position // size])
        assert block >= 0, f"position {position} has no block in group {group}"
        return block * size + position % size

    def _copy(self) -> None:
        size = self.cache.block_size
        for group, slots in enumerate(self.slots):
            for source, target in self.cache.take_copies(group):
                for offset in range(size):
                    if source * size + offset in slots:
                        slots[target * size + offset] = slots[source * size + offset]
            assert not self.cache.take_copies(group), "copies are handed out twice"

    def _write(self, line: Line, target: int) -> None:
        for group, slots in enumerate(self.slots):
            for position in range(line.computed, target):
                slots[self._slot(group, line.row, position)] = line.history[position]

    def _read(self, line: Line, target: int) -> None:
        for group, kv_group in enumerate(self.needs.groups):
            window = kv_group.window
            low = 0 if window is None else max(0, line.computed - window + 1)
            for position in [*range(min(kv_group.sinks, low)), *range(low, target)]:
                got = self.slots[group].get(self._slot(group, line.row, position))
                assert got == line.history[position], (
                    f"group {group}: position {position} of {target} holds another token's KV"
                )

    def one(self) -> None:
        """One random operation, and the integrity check."""
        actions = [self.arrive, self.start, self.step, self.fork, self.truncate]
        actions += [self._abort, self._give_way, self.swap_out, self.swap_in]
        swaps = 6 if self.needs.swap_bytes else 0
        action = self.rng.choices(actions, [10, 20, 50, 4, 4, 4, 4, swaps, 2 * swaps])[0]
        if action is self.arrive and len(self.waiting) > 12:
            action = self.start
        action()
        self.cache.check_integrity()

    def swap_out(self) -> None:
        """A sequence is preempted, and what it has computed waits outside of the pool."""
        ready = [i for i, line in self.live.items() if line.computed]
        if not ready:
            return
        seq_id = self.rng.choice(ready)
        free = self.cache.num_free_blocks
        assert self.cache.swap_bytes(seq_id) > 0, "swapping computed tokens out would copy nothing"
        if self.cache.swap_out(seq_id):
            self.swapped[seq_id] = line = self.live.pop(seq_id)
            self.free_rows.append(line.row)
        else:
            assert self.cache.num_free_blocks == free, "a swap_out that failed gave blocks back"

    def swap_in(self) -> None:
        if not self.swapped or not self.free_rows:
            return
        seq_id = self.rng.choice(list(self.swapped))
        if self.rng.random() < 0.2:  # it is aborted where it waits
            del self.swapped[seq_id]
            self.cache.discard(seq_id)
            return
        line, row = self.swapped[seq_id], self.free_rows[-1]
        if line.computed == len(line.tokens):
            if len(line.tokens) >= self.needs.max_model_len:
                return
            line.extend(self.rng.randint(0, 9))
        before = [table.copy() for table in self.cache.block_tables]
        free = self.cache.num_free_blocks
        if self.cache.swap_in(seq_id, row, line.tokens, line.computed + 1):
            line.row = self.free_rows.pop()
            line.hit = line.computed
            self.live[seq_id] = self.swapped.pop(seq_id)
            return
        assert self.live, "swap_in found no room in an empty pool"
        assert self.cache.num_free_blocks == free, "a swap_in that failed took blocks"
        for old, table in zip(before, self.cache.block_tables, strict=True):
            assert (old == table).all(), "a swap_in that failed changed a block table"

    def _abort(self) -> None:
        self.leave(again=False)

    def _give_way(self) -> None:
        self.leave(again=True)

    def finish(self) -> None:
        """Everybody leaves: all blocks are free again, cached ones included."""
        for seq_id in list(self.live):
            self.cache.free(seq_id)
            self.cache.check_integrity()
        for seq_id in self.swapped:
            self.cache.discard(seq_id)
            self.cache.check_integrity()
        stats = self.cache.stats()
        assert stats["num_free_blocks"] == stats["num_blocks"] == self.cache.num_free_blocks, (
            f"{stats['num_free_blocks']} of {stats['num_blocks']} blocks are free at the end"
        )
        self.cache.reset_prefix_cache()
        self.cache.check_integrity()


class CacheConformance(Conformance):
    """``strategy``: the cache's class.

    Attributes:
        operations: Length of the longest random history.
        windows: KV groups to try; what ``supports`` refuses is left out.
    """

    contract = "cache"
    operations = 10_000
    windows: tuple[tuple[int | None, ...], ...] = ((None,), (None, 20), (9,), (40, None))

    def make(self, needs: CacheNeeds) -> Any:
        return self.strategy(needs)

    def supported(self, windows: Sequence[int | None], tokens: int, **changes: Any) -> Any:
        """Needs that the cache takes, or None."""
        needs = needs_for(windows, tokens, **changes)
        refused = self.strategy.undeclared(needs) or self.strategy.supports(needs)
        return None if refused is not None else needs

    def test_random_operations(self) -> None:
        needs = self.supported(self.windows[0], 320)
        if needs is not None:
            self._random(needs, self.operations, 1)

    def test_random_operations_with_windows(self) -> None:
        for seed, windows in enumerate(self.windows[1:]):
            needs = self.supported(windows, 320)
            if needs is not None:
                self._random(needs, self.operations // 5, seed)

    def test_random_operations_with_sinks(self) -> None:
        for seed, sinks in enumerate((4, 20)):
            needs = self.supported((None, 24), 400, sinks=sinks)
            if needs is not None:
                self._random(needs, self.operations // 5, seed)

    def test_random_operations_with_a_swap_space(self) -> None:
        cases: list[tuple[tuple[int | None, ...], dict[str, Any]]] = [
            ((None,), {}),
            ((None,), {"prefix_caching": False}),
            ((None, 20), {}),
            ((24,), {"sinks": 20}),
        ]
        for seed, (windows, options) in enumerate(cases):
            space = 150 * TOKEN_BYTES * len(windows)
            needs = self.supported(windows, 320, swap_bytes=space, **options)
            if needs is not None:
                self._random(needs, self.operations // 5, seed)

    def test_random_operations_without_prefix_caching(self) -> None:
        needs = self.supported(self.windows[0], 320, prefix_caching=False)
        if needs is not None:
            self._random(needs, self.operations // 5, 7)

    def test_random_operations_in_a_large_cache(self) -> None:
        needs = self.supported(self.windows[0], 8 * 128)
        if needs is not None:
            self._random(needs, self.operations // 5, 8)

    def _random(self, needs: CacheNeeds, operations: int, seed: int) -> None:
        model = CacheModel(self.make(needs), needs, seed)
        for index in range(operations):
            try:
                model.one()
            except AssertionError as error:
                raise AssertionError(f"operation {index} (seed {seed}): {error}") from error
        model.finish()

    def test_sizes(self) -> None:
        for windows in self.windows:
            needs = self.supported(windows, 1000)
            if needs is None:
                continue
            cache = self.make(needs)
            assert 0 < cache.nbytes <= needs.max_bytes, f"{cache.nbytes} of {needs.max_bytes} bytes"
            assert len(cache.block_tables) == len(needs.groups)
            for table in cache.block_tables:
                assert table.dtype == np.int32 and table.flags.c_contiguous
                assert table.shape[0] == needs.max_rows
                assert table.shape[1] * cache.block_size >= needs.max_model_len
            assert all(a is b for a, b in zip(cache.block_tables, cache.block_tables, strict=True))
            assert cache.layout and cache.kv_dtype

    def test_longest_sequence_fits_alone(self) -> None:
        for windows in self.windows:
            for tokens in (70, 150, 1000):
                needs = self.supported(windows, tokens)
                if needs is None:
                    continue
                try:
                    cache = self.make(needs)
                except CapacityError:
                    continue
                longest = cache.max_tokens_per_sequence()
                assert 0 < longest <= needs.max_model_len
                ids = list(range(longest))
                done = cache.acquire(1, 0, ids)
                assert done == 0
                while done < longest:
                    done = min(longest, done + needs.max_num_batched_tokens)
                    assert cache.reserve(1, done), f"no room for {done} of {longest} tokens"
                    cache.commit(1, ids, done)
                cache.check_integrity()
                cache.free(1)
                cache.check_integrity()

    def test_too_little_memory(self) -> None:
        needs = self.supported(self.windows[0], 1)
        if needs is None:
            return
        try:
            self.make(needs)
        except CapacityError as error:
            assert "\n" not in str(error)
        else:
            raise AssertionError("a cache of one token's memory was made")

    def test_prefix_in_flight_never_blocks(self) -> None:
        """Who waits for a prefix goes on as soon as the other leaves, whatever it had done."""
        needs = self.supported(self.windows[0], 1000)
        if needs is None:
            return
        for computed in (0, 5, 64, 90):
            cache = self.make(needs)
            ids = list(range(100))
            assert cache.acquire(1, 0, ids) == 0
            assert cache.reserve(1, max(computed, 1))
            if computed:
                cache.commit(1, ids, computed)
            cache.acquire(2, 1, ids)  # None, or a number: then 2 is held
            cache.free(1)
            cache.check_integrity()
            hit = cache.acquire(3, 2, ids)
            if hit is None:  # it waits for 2
                cache.free(2)
                hit = cache.acquire(3, 2, ids)
            assert hit is not None and 0 <= hit <= computed, f"hit {hit} of {computed} computed"

    def test_salt_keeps_apart(self) -> None:
        needs = self.supported(self.windows[0], 1000)
        if needs is None:
            return
        cache = self.make(needs)
        ids = list(range(100))
        cache.acquire(1, 0, ids)
        cache.reserve(1, 100)
        cache.commit(1, ids, 100)
        assert cache.acquire(2, 1, ids, salt=1) == 0, "a prefix was shared across salts"

    def test_stored_and_read_back(self) -> None:
        """The tensors, store and copy ops, with the attention that ``auto`` chooses for them:
        queries read what dense attention over all keys gives, across forks and chunks."""
        for windows, rotary in [((None,), 0), ((None, 20), 8), ((9,), 16)]:
            for dtype in ("f32", "bf16"):
                shape = HeadShape(4, 2, 16)
                check_against_dense(
                    self.strategy, None, shape, windows, dtype=dtype, rotary_dim=rotary
                )
        if self.strategy.keeps_sinks:
            shape = HeadShape(4, 2, 16)
            check_against_dense(self.strategy, None, shape, (None, 20), rotary_dim=8, sinks=4)
