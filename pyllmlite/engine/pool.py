"""Who runs and who waits: the two lists, the rows of the native batch, the way between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyllmlite.core.request import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyllmlite.core.request import Sequence
    from pyllmlite.hooks.cache import KVCache


class SequencePool:
    """Sequences that have not ended.

    A running sequence holds a row and an id in the cache; a waiting one holds neither.

    Attributes:
        running: In the order in which they started.
        waiting: In the order of arrival; a preempted one is first.
        free_rows: Rows of the native batch that nobody holds.
        version: Counts changes of the two lists.
        preemptions: Counts them.

    Args:
        worth_swapping: Of a sequence's computed tokens and the bytes of its blocks: is swapping
            cheaper than computing them again?  None: never.
    """

    def __init__(
        self,
        cache: KVCache,
        max_num_seqs: int,
        worth_swapping: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.cache = cache
        self._worth_swapping = worth_swapping
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.version = 0
        self.preemptions = 0

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, seq: Sequence, first: bool = False) -> None:
        """A sequence begins to wait."""
        seq.status = Status.WAITING
        self.waiting.insert(0, seq) if first else self.waiting.append(seq)
        self.version += 1

    def take_row(self, seq: Sequence) -> int:
        """The caller has just put ``seq`` into the cache on the row that is free next."""
        seq.row = self.free_rows.pop()
        seq.status = Status.RUNNING
        self.running.append(seq)
        self.version += 1
        return seq.row

    @property
    def next_row(self) -> int:
        return self.free_rows[-1]

    def preempt(self, seq: Sequence, first: bool = True) -> None:
        """Its blocks and its row go back; it waits, before (``first``) or behind all others, to
        be swapped in or computed again."""
        swapped = self._swap_out(seq)
        self._leave(seq, free=not swapped)
        self.preemptions += 1
        seq.output.reached = max(seq.output.reached, seq.num_computed)
        seq.output.swapped = swapped
        if not swapped:
            seq.num_computed = 0
        seq.draft_ids = []
        seq.preemptions += 1
        self.add(seq, first)

    def remove(self, seq: Sequence) -> None:
        """It has ended, whichever list it stands in."""
        if seq.status is Status.RUNNING:
            self._leave(seq)
        elif seq.status is Status.WAITING and seq in self.waiting:
            self.waiting.remove(seq)
            self.forget_swapped(seq)
        seq.status = Status.FINISHED
        self.version += 1

    def _swap_out(self, seq: Sequence) -> bool:
        # One that has nothing to run (a beam that waits for the others) must run again, to say
        # again what it has found.
        if self._worth_swapping is None or not seq.num_uncomputed or not seq.num_computed:
            return False
        cache = self.cache
        worth = self._worth_swapping(seq.num_computed, cache.swap_bytes(seq.id))
        return worth and cache.swap_out(seq.id)

    def forget_swapped(self, seq: Sequence) -> None:
        """What waits of it in the swap space, if anything does."""
        if seq.output.swapped:
            self.cache.discard(seq.id)
            seq.output.swapped = False
            seq.num_computed = 0

    def _leave(self, seq: Sequence, free: bool = True) -> None:
        if free:
            self.cache.free(seq.id)
        self.running.remove(seq)
        self.free_rows.append(seq.row)
        seq.row = -1

    def check_integrity(self) -> None:
        """``AssertionError`` with a reason if a row or a sequence is lost or held twice."""
        self.cache.check_integrity()
        rows = self.free_rows + [seq.row for seq in self.running]
        assert sorted(rows) == list(range(len(rows))), f"rows are lost or held twice: {rows}"
        everybody: list[Any] = self.running + self.waiting
        assert len({seq.id for seq in everybody}) == len(everybody), "a sequence stands twice"
        for seq in self.running:
            assert seq.status is Status.RUNNING, f"{seq} runs"
            assert 0 <= seq.num_computed <= len(seq.token_ids), f"{seq}: tokens computed"
        for seq in self.waiting:
            assert seq.status is Status.WAITING and seq.row == -1, f"{seq} waits"
