"""The swap space: where the blocks of preempted sequences wait outside of the pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Copies = list[list[tuple[int, int]]]  # per group: (source, destination)


class Swapped(NamedTuple):
    """What waits of one sequence.

    Attributes:
        blocks: Per group its blocks in order, by their numbers in the swap space; -1: fell out of
            the window.
        first: Per group the index of the first that did not.
        computed: Tokens that are in them.
        salt: As it was acquired with.
    """

    blocks: list[list[int]]
    first: list[int]
    computed: int
    salt: int


class SwapSpace:
    """Bookkeeping only: the copies are carried out with the step's others, in their order.  Blocks
    are counted on from the pool's, so that a copy's two numbers say where it goes."""

    def __init__(self, pools: Sequence[int], counts: Sequence[int]) -> None:
        """``pools``: per group the pool's blocks; ``counts``: those of the swap space."""
        self.counts = list(counts)
        self._first = list(pools)
        self._free = [
            list(range(first + count - 1, first - 1, -1))
            for first, count in zip(pools, counts, strict=True)
        ]
        self._waiting: dict[int, Swapped] = {}

    @property
    def num_free(self) -> int:
        """Of the tightest group."""
        return min(len(free) for free in self._free)

    def put(
        self, seq_id: int, blocks: list[list[int]], first: list[int], computed: int, salt: int
    ) -> Copies | None:
        """The copies that bring a sequence's blocks here; None: there is no room."""
        wanted = [sum(block >= 0 for block in group) for group in blocks]
        if any(n > len(free) for n, free in zip(wanted, self._free, strict=True)):
            return None
        copies: Copies = []
        taken = []
        for group, free in zip(blocks, self._free, strict=True):
            here = [free.pop() if block >= 0 else -1 for block in group]
            taken.append(here)
            copies.append([(a, b) for a, b in zip(group, here, strict=True) if a >= 0])
        self._waiting[seq_id] = Swapped(taken, list(first), computed, salt)
        return copies

    def get(self, seq_id: int) -> Swapped:
        return self._waiting[seq_id]

    def drop(self, seq_id: int) -> None:
        """Its blocks may be taken again (by copies that come later)."""
        swapped = self._waiting.pop(seq_id)
        for blocks, free in zip(swapped.blocks, self._free, strict=True):
            free.extend(block for block in reversed(blocks) if block >= 0)

    def check(self) -> None:
        """``AssertionError`` if a block is lost or held twice."""
        for g, (free, first, count) in enumerate(
            zip(self._free, self._first, self.counts, strict=True)
        ):
            held = [b for s in self._waiting.values() for b in s.blocks[g] if b >= 0]
            assert sorted(free + held) == list(range(first, first + count)), (
                f"blocks of the swap space of group {g} are lost or held twice"
            )
