"""The blocks of one KV group: reference counts, the free list, and least-recently-used eviction."""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyllmlite_plugins.cache.prefix_tree import Node, PrefixTree


class BlockPool:
    """Every block is in one of three states: held (``refs`` > 0), evictable (unreferenced, but
    its contents are known by a node of the prefix tree), or free.

    Attributes:
        refs: How many sequences hold each block.
        nodes: The prefix-tree node that knows each block's contents, or None.
    """

    def __init__(self, num_blocks: int, group: int, tree: PrefixTree | None) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.nodes: list[Node | None] = [None] * num_blocks
        self.evictions = 0
        self._group = group
        self._tree = tree
        # A heap: the lowest block first.  A sequence then gets neighbours, which are read fastest,
        # and memory that was used before, where a new page costs a fault.
        self._free = list(range(num_blocks))
        self._evictable: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        """Blocks that :meth:`take` can give, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Unreferenced blocks whose contents can still be found."""
        return len(self._evictable)

    def take(self) -> int:
        """A block with unknown contents, held once.  There must be one (``num_free``)."""
        if self._free:
            block = heappop(self._free)
        else:
            block, _ = self._evictable.popitem(last=False)
            self.evictions += 1
            self.forget(block)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more sequence holds it."""
        if self.refs[block] == 0:
            del self._evictable[block]
        self.refs[block] += 1

    def release(self, block: int) -> None:
        """One sequence fewer holds it; the last one leaves it evictable, or free if nothing
        knows its contents."""
        refs = self.refs[block] - 1
        self.refs[block] = refs
        if refs == 0:
            if self.nodes[block] is None:
                heappush(self._free, block)
            else:
                self._evictable[block] = None

    def forget(self, block: int) -> None:
        """Its contents are about to change: no prefix may find it any more."""
        node = self.nodes[block]
        if node is not None and self._tree is not None:
            self.nodes[block] = None
            self._tree.detach(node, self._group)

    def forget_unreferenced(self) -> None:
        """All evictable blocks become free."""
        while self._evictable:
            block, _ = self._evictable.popitem(last=False)
            self.forget(block)
            heappush(self._free, block)

    def check(self, held: dict[int, int]) -> None:
        """``held``: how many sequences hold each block.  ``AssertionError`` with a reason."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._evictable.keys(), "a block is free and evictable"
        for block in range(self.num_blocks):
            refs = self.refs[block]
            assert refs == held.get(block, 0), (
                f"block {block} of group {self._group}: reference count {refs}, "
                f"held by {held.get(block, 0)}"
            )
            idle = (block in free) + (block in self._evictable)
            assert idle == (refs == 0), f"block {block} has {refs} references and is idle: {idle}"
            node = self.nodes[block]
            assert (block in self._evictable) == (refs == 0 and node is not None), (
                f"block {block} is evictable without known contents, or the reverse"
            )
            assert node is None or node.blocks[self._group] == block, (
                f"block {block} and its prefix node disagree"
            )
