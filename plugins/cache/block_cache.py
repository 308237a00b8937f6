"""Sequences over blocks: block tables, copy-on-write, windows, and sharing through a prefix tree.

All built-in caches are this class; they differ in the size of a block, in what is stored, and in
whether blocks are shared between requests.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pyllmlite.hooks.cache import CacheNeeds
from pyllmlite_plugins.cache.block_pool import BlockPool
from pyllmlite_plugins.cache.plan import Kept, peak_blocks, split
from pyllmlite_plugins.cache.prefix_tree import Node, PrefixTree
from pyllmlite_plugins.cache.storage import BlockStorage
from pyllmlite_plugins.cache.swap_space import SwapSpace

NEVER = sys.maxsize
# A sequence waits for a prefix in flight if that saves at least this part of what it would
# have to run; for less it would lose more by starting a step later.
WAIT_FOR = 0.25


class _Held:
    """What one sequence holds.

    Attributes:
        blocks: Per group its blocks in order; -1: fell out of the window.
        first: Per group the index of the first that did not; those of sinks stay before it.
        computed: Tokens that are in the cache.
        full: Blocks whose contents are committed.
        ready: Tokens for which there is room that only this sequence writes to.
        next_work: ``computed`` at which a commit has more to do than to note it.
        node: The prefix-tree node of the last full block.
        pending: Nodes that others may wait for.
        hit: Tokens taken over at the start; ``asked``: tokens it came with.
    """

    __slots__ = (
        "asked",
        "blocks",
        "computed",
        "first",
        "full",
        "hit",
        "next_work",
        "node",
        "pending",
        "ready",
        "row",
        "salt",
    )

    def __init__(self, row: int, num_groups: int, salt: int) -> None:
        self.row = row
        self.salt = salt
        self.blocks: list[list[int]] = [[] for _ in range(num_groups)]
        self.first = [0] * num_groups
        self.computed = 0
        self.full = 0
        self.ready = 0
        self.next_work = NEVER
        self.node: Node | None = None
        self.pending: set[Node] = set()
        self.hit = 0
        self.asked = 0


def _present(blocks: list[int]) -> list[int]:
    return [block for block in blocks if block >= 0]


class BlockCache(BlockStorage):
    """A :class:`KVCache` over pools of equal blocks, one pool for each KV group."""

    keeps_sinks = True
    swaps = True
    share_prefixes = False

    def __init__(self, needs: CacheNeeds) -> None:
        super().__init__(needs)
        size = self.block_size
        self._kept = [Kept(group.window, -(-group.sinks // size)) for group in needs.groups]
        sharing = self.share_prefixes and needs.prefix_caching
        counts = split(
            self._kept,
            self._block_bytes,
            self.block_size,
            needs.max_bytes,
            needs.max_model_len,
            needs.max_rows,
            needs.max_num_batched_tokens,
            keep_unreferenced=sharing,
        )
        self.num_blocks = min(counts)
        self._allot(counts)
        self._swap = SwapSpace(counts, self.swap_counts) if needs.swap_bytes else None
        self._tree = PrefixTree(self.block_size, self._kept) if sharing else None
        self._pools = [BlockPool(n, g, self._tree) for g, n in enumerate(counts)]
        self._max_blocks = -(-needs.max_model_len // self.block_size)
        self._tables = [
            np.full((needs.max_rows, self._max_blocks), -1, np.int32) for _ in self._pools
        ]
        self._tracks_blocks = sharing or any(kept.window is not None for kept in self._kept)
        self._held: dict[int, _Held] = {}
        self._copies: list[list[tuple[int, int]]] = [[] for _ in self._pools]
        self._num_copies = self._num_swapped = self._waits = 0
        self._hit_tokens = self._query_tokens = 0

    # -- sequences ---------------------------------------------------------------------------
    @property
    def block_tables(self) -> list[np.ndarray]:
        return self._tables

    def acquire(self, seq_id: int, row: int, token_ids: Sequence[int], salt: int = 0) -> int | None:
        if seq_id in self._held:
            raise ValueError(f"sequence {seq_id} is in the cache already")
        held = _Held(row, len(self._pools), salt)
        held.asked = len(token_ids)
        if self._tree is not None:
            path, in_flight = self._tree.match(token_ids, salt)
            hit = len(path) * self.block_size
            if in_flight * self.block_size >= max(1.0, WAIT_FOR * (len(token_ids) - hit)):
                self._waits += 1
                return None
            self._take_over(held, path)
            self._announce(held, seq_id, token_ids, path[-1] if path else self._tree.root(salt))
        if self._tracks_blocks:
            held.next_work = (held.full + 1) * self.block_size
        self._held[seq_id] = held
        self._hit_tokens += held.hit
        self._query_tokens += held.asked
        return held.hit

    def _take_over(self, held: _Held, path: list[Node]) -> None:
        """Hold the blocks of the prefix that the next token still sees."""
        held.full = len(path)
        held.hit = held.computed = held.ready = len(path) * self.block_size
        for g, (pool, (window, sinks)) in enumerate(zip(self._pools, self._kept, strict=True)):
            first = 0 if window is None else max(0, held.hit - window + 1) // self.block_size
            first = 0 if first <= sinks else first
            blocks = [
                node.blocks[g] if i < sinks or i >= first else -1 for i, node in enumerate(path)
            ]
            for block in _present(blocks):
                pool.share(block)
            held.first[g] = first
            held.blocks[g] = blocks
            self._tables[g][held.row, : len(blocks)] = blocks

    def _announce(self, held: _Held, seq_id: int, token_ids: Sequence[int], node: Node) -> None:
        """Stand on the prefix's last node; the full blocks behind it are being computed."""
        tree, size = self._tree, self.block_size
        assert tree is not None
        held.node = node
        tree.use(node)
        for start in range(held.hit, len(token_ids) - size + 1, size):
            node = tree.child(node, tuple(token_ids[start : start + size]))
            if node.owner is None and min(node.blocks) < 0:
                node.owner = seq_id
                held.pending.add(node)
                tree.use(node)

    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        held = self._held[seq_id]
        if num_tokens <= held.ready:
            return True
        return self._grow(held, num_tokens)

    def _grow(self, held: _Held, num_tokens: int) -> bool:
        size = self.block_size
        want = -(-num_tokens // size)
        start = held.computed // size  # the first block that may be written
        if want > self._max_blocks:
            raise ValueError(f"{num_tokens} tokens exceed max_model_len {self.needs.max_model_len}")
        for pool, blocks in zip(self._pools, held.blocks, strict=True):
            shared = sum(pool.refs[block] > 1 for block in blocks[start:want])
            if max(0, want - len(blocks)) + shared > pool.num_free:
                return False
        for g, (pool, blocks) in enumerate(zip(self._pools, held.blocks, strict=True)):
            table = self._tables[g][held.row]
            for i in range(start, min(want, len(blocks))):
                block = blocks[i]
                if pool.refs[block] > 1:
                    blocks[i] = table[i] = pool.take()
                    self._copies[g].append((block, blocks[i]))
                    self._num_copies += 1
                    pool.release(block)
                else:
                    pool.forget(block)
            while len(blocks) < want:
                block = pool.take()
                table[len(blocks)] = block
                blocks.append(block)
        held.ready = want * size
        return True

    def commit(self, seq_id: int, token_ids: Sequence[int], num_computed: int) -> None:
        held = self._held[seq_id]
        held.computed = num_computed
        if num_computed >= held.next_work:
            self._fill(held, token_ids)

    def _fill(self, held: _Held, token_ids: Sequence[int]) -> None:
        """Blocks have become full: others may share them, and windows have moved on."""
        tree, size = self._tree, self.block_size
        full = held.computed // size
        if tree is not None:
            node = held.node
            assert node is not None
            for i in range(held.full, full):
                parent = node
                node = tree.child(parent, tuple(token_ids[i * size : (i + 1) * size]))
                tree.use(node)
                tree.leave(parent)
                for g, pool in enumerate(self._pools):
                    block = held.blocks[g][i]
                    if block >= 0 and node.blocks[g] < 0 and pool.nodes[block] is None:
                        tree.attach(node, g, block)
                        pool.nodes[block] = node
                if node in held.pending:
                    self._settle(held, node)
            held.node = node
        held.full = full
        held.next_work = (full + 1) * size
        for g, (window, _) in enumerate(self._kept):
            if window is not None:
                # One block is kept beyond the window: a sequence may go back a little.
                self._drop(held, g, max(0, held.computed - window + 1) // size - 1)

    def _drop(self, held: _Held, group: int, first: int) -> None:
        """The blocks before ``first`` fell out of the window, but for those of the sinks."""
        pool, blocks = self._pools[group], held.blocks[group]
        old = max(held.first[group], self._kept[group].sinks)
        for i in range(old, first):
            if blocks[i] >= 0:
                pool.release(blocks[i])
            blocks[i] = -1
        if first > old:
            self._tables[group][held.row, old:first] = -1
            held.first[group] = first

    def _settle(self, held: _Held, node: Node) -> None:
        """The sequence computes the node no longer: it is done, or it never will be."""
        held.pending.discard(node)
        node.owner = None
        assert self._tree is not None
        self._tree.leave(node)

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Raises ``ValueError`` if the window of that length is gone: more than a block before
        the last commit, or before what was taken over (free it and acquire it again)."""
        held, size = self._held[seq_id], self.block_size
        if num_tokens < held.computed:
            for (window, _), first in zip(self._kept, held.first, strict=True):
                if window is not None and max(0, num_tokens - window + 1) // size < first:
                    raise ValueError(
                        f"sequence {seq_id} cannot go back to {num_tokens} tokens: "
                        "their window is no longer held"
                    )
            held.computed = held.ready = num_tokens  # what is shared is copied when written
            for node in list(held.pending):
                self._settle(held, node)
            self._step_back(held, num_tokens // size)
        keep = -(-num_tokens // size)
        for g, (pool, blocks) in enumerate(zip(self._pools, held.blocks, strict=True)):
            if len(blocks) > keep:
                for block in reversed(blocks[keep:]):
                    pool.release(block)
                del blocks[keep:]
                self._tables[g][held.row, keep:] = -1
        held.ready = min(held.ready, keep * size)

    def _step_back(self, held: _Held, full: int) -> None:
        if full >= held.full:
            return
        if self._tree is not None:
            node = held.node
            for _ in range(held.full - full):
                assert node is not None
                node = node.parent
            assert node is not None and held.node is not None
            self._tree.use(node)
            self._tree.leave(held.node)
            held.node = node
        held.full = full
        if self._tracks_blocks:
            held.next_work = (full + 1) * self.block_size

    def fork(self, parent_id: int, child_id: int, row: int) -> None:
        if child_id in self._held:
            raise ValueError(f"sequence {child_id} is in the cache already")
        parent = self._held[parent_id]
        child = _Held(row, len(self._pools), parent.salt)
        child.computed, child.full = parent.computed, parent.full
        child.next_work = parent.next_work
        child.first = list(parent.first)
        parent.ready = child.ready = min(parent.ready, parent.computed)
        keep = -(-parent.computed // self.block_size)
        for g, pool in enumerate(self._pools):
            blocks = parent.blocks[g][:keep]
            for block in _present(blocks):
                pool.share(block)
            child.blocks[g] = blocks
            self._tables[g][row, :keep] = blocks
        if self._tree is not None:
            child.node = parent.node
            assert child.node is not None
            self._tree.use(child.node)
        self._held[child_id] = child

    def free(self, seq_id: int) -> None:
        held = self._held.pop(seq_id)
        if held.computed == held.hit:  # it never ran: not a hit that served anybody
            self._hit_tokens -= held.hit
            self._query_tokens -= held.asked
        self._let_go(held)
        if self._tree is not None:
            for node in list(held.pending):
                self._settle(held, node)
            assert held.node is not None
            self._tree.leave(held.node)

    def _let_go(self, held: _Held) -> None:
        for g, (pool, blocks) in enumerate(zip(self._pools, held.blocks, strict=True)):
            # Last first, so that the tail of a prefix is evicted before its beginning.
            for block in reversed(_present(blocks)):
                pool.release(block)
            self._tables[g][held.row, : len(blocks)] = -1

    # -- the swap space ----------------------------------------------------------------------
    def swap_out(self, seq_id: int) -> bool:
        held = self._held[seq_id]
        if self._swap is None or not held.computed:
            return False
        filled = -(-held.computed // self.block_size)
        blocks = [group[:filled] for group in held.blocks]
        copies = self._swap.put(seq_id, blocks, held.first, held.computed, held.salt)
        if copies is None:
            return False
        for queue, more in zip(self._copies, copies, strict=True):
            queue += more
        self._num_swapped += sum(map(len, copies))
        self.free(seq_id)
        return True

    def swap_in(self, seq_id: int, row: int, token_ids: Sequence[int], num_tokens: int) -> bool:
        """What is still in the prefix tree is taken from there, the rest from the swap space."""
        assert self._swap is not None
        size, swapped = self.block_size, self._swap.get(seq_id)
        held = _Held(row, len(self._pools), swapped.salt)
        path: list[Node] = []
        if self._tree is not None:
            path = self._tree.match(token_ids, swapped.salt)[0][: swapped.computed // size]
        self._take_over(held, path)
        want = -(-num_tokens // size)
        missing = [
            [i for i in range(len(path), len(blocks)) if blocks[i] >= 0]
            for blocks in swapped.blocks
        ]
        for g, (pool, back) in enumerate(zip(self._pools, missing, strict=True)):
            if len(back) + want - len(swapped.blocks[g]) > pool.num_free:
                self._let_go(held)
                return False
        for g, (pool, back) in enumerate(zip(self._pools, missing, strict=True)):
            blocks = held.blocks[g] + [-1] * (len(swapped.blocks[g]) - len(path))
            for i in back:
                blocks[i] = pool.take()
                self._copies[g].append((swapped.blocks[g][i], blocks[i]))
            held.blocks[g] = blocks
            self._tables[g][row, : len(blocks)] = blocks
            self._drop(held, g, swapped.first[g])
        if self._tree is not None:
            held.node = path[-1] if path else self._tree.root(swapped.salt)
            self._tree.use(held.node)
        # Blocks that came back are found by others from the next commit on: only then it is known
        # that the copies have been made.
        held.computed = held.ready = swapped.computed
        held.hit = 0  # no hit: it had them before
        if self._tracks_blocks:
            held.next_work = (held.full + 1) * size
        self._held[seq_id] = held
        self._swap.drop(seq_id)
        return self._grow(held, num_tokens)

    def discard(self, seq_id: int) -> None:
        assert self._swap is not None
        self._swap.drop(seq_id)

    def swap_bytes(self, seq_id: int) -> int:
        filled = -(-self._held[seq_id].computed // self.block_size)
        groups = zip(self._held[seq_id].blocks, self._block_bytes, strict=True)
        return sum(len(_present(blocks[:filled])) * size for blocks, size in groups)

    def take_copies(self, group: int) -> list[tuple[int, int]]:
        copies = self._copies[group]
        if copies:
            self._copies[group] = []
        return copies

    # -- state -------------------------------------------------------------------------------
    @property
    def num_free_blocks(self) -> int:
        return min([pool.num_free for pool in self._pools])

    def blocks_needed(self, seq_id: int | None, num_tokens: int) -> int:
        size = self.block_size
        want = -(-num_tokens // size)
        if seq_id is None:
            chunk = self.needs.max_num_batched_tokens
            return max(peak_blocks(num_tokens, kept, size, chunk) for kept in self._kept)
        held = self._held[seq_id]
        if num_tokens <= held.ready:
            return 0
        start = held.computed // size
        return max(
            max(0, want - len(blocks)) + sum(pool.refs[b] > 1 for b in blocks[start:want])
            for pool, blocks in zip(self._pools, held.blocks, strict=True)
        )

    def max_tokens_per_sequence(self) -> int:
        longest = self.needs.max_model_len
        for pool, kept in zip(self._pools, self._kept, strict=True):
            peak = peak_blocks(
                longest, kept, self.block_size, self.needs.max_num_batched_tokens
            )
            if peak > pool.num_blocks:
                longest = min(longest, pool.num_blocks * self.block_size)
        return longest

    def stats(self) -> dict[str, int]:
        return {
            "num_blocks": self.num_blocks,
            "num_free_blocks": self.num_free_blocks,
            "num_cached_blocks": min(pool.num_cached for pool in self._pools),
            "hit_tokens": self._hit_tokens,
            "query_tokens": self._query_tokens,
            "evictions": sum(pool.evictions for pool in self._pools),
            "copies": self._num_copies,
            "swapped_blocks": self._num_swapped,
            "num_free_swap_blocks": 0 if self._swap is None else self._swap.num_free,
            "waits": self._waits,
        }

    def reset_prefix_cache(self) -> None:
        for pool in self._pools:
            pool.forget_unreferenced()

    def check_integrity(self) -> None:
        size = self.block_size
        for g, pool in enumerate(self._pools):
            counts: Counter[int] = Counter()
            expected = np.full_like(self._tables[g], -1)
            for seq_id, held in self._held.items():
                blocks, first = held.blocks[g], held.first[g]
                sinks = self._kept[g].sinks if first else 0
                assert all(b < 0 for b in blocks[sinks:first]), (
                    f"sequence {seq_id} holds dropped blocks"
                )
                assert all(b >= 0 for b in blocks[:sinks] + blocks[first:]), (
                    f"sequence {seq_id} misses a block"
                )
                assert held.computed <= len(blocks) * size, f"sequence {seq_id} lacks room"
                counts.update(_present(blocks))
                expected[held.row, : len(blocks)] = blocks
                for block in blocks[held.computed // size : -(-held.ready // size)]:
                    if held.ready > held.computed:
                        assert pool.refs[block] == 1 and pool.nodes[block] is None, (
                            f"sequence {seq_id} would write to shared block {block}"
                        )
            pool.check(counts)
            assert (expected == self._tables[g]).all(), f"block table of group {g} is wrong"
        if self._swap is not None:
            self._swap.check()
        if self._tree is not None:
            self._check_tree(self._tree)

    def _check_tree(self, tree: PrefixTree) -> None:
        standing = Counter(id(held.node) for held in self._held.values())
        for node in tree.nodes():
            blocks = [(g, b) for g, b in enumerate(node.blocks) if b >= 0]
            owned = node.owner is not None
            uses = len(node.children) + len(blocks) + owned + standing.get(id(node), 0)
            assert node.uses == uses > 0, f"a prefix node counts {node.uses} uses, has {uses}"
            assert all(self._pools[g].nodes[b] is node for g, b in blocks), (
                "a prefix node names a block that does not know it"
            )
            assert not owned or node in self._held[node.owner].pending, (
                "a prefix is in flight in no sequence"
            )
