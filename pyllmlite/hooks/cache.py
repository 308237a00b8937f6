"""KVCache: where keys and values live, who shares them, and what is thrown out when full."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyllmlite.hooks.strategy import Strategy

if TYPE_CHECKING:
    import numpy as np

    from pyllmlite.hooks.sink import OpSink


@dataclass(frozen=True)
class KVGroup:
    """Layers that keep the same tokens.

    Attributes:
        window: Tokens that a query still sees; None: all.
        sinks: First tokens of a sequence that it sees besides (StreamingLLM, Xiao et al. 2023);
            more than 0 only with a window.
    """

    layers: tuple[int, ...]
    window: int | None
    sinks: int = 0


@dataclass(frozen=True)
class CacheNeeds:
    """What the model asks of a cache, and what it may use.

    Attributes:
        kv_dtype: ``"auto"`` or a word the cache knows.
        max_bytes: Memory for keys and values; the cache takes at most that.
        max_rows: Sequences that run at once.
        swap_bytes: Memory beside that, for the blocks of preempted sequences; 0: none.
    """

    device: str
    dtype: str
    groups: tuple[KVGroup, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    max_rows: int
    max_num_batched_tokens: int
    max_bytes: int
    kv_dtype: str = "auto"
    block_size: int | None = None
    prefix_caching: bool = True
    swap_bytes: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class KVView:
    """One layer's part of the cache, as ops see it.

    Attributes:
        layout: The word an attention must know to read it.
        dtype: Storage dtype (``f32``, ``bf16``, ... or a plugin's).
        group: Index into the batch's KV groups.
        k, v: Buffers of the Program; ``extra``: scales and the like, by name.
        rotated_keys: Keys are stored after rotation.
    """

    layout: str
    dtype: str
    group: int
    block_size: int
    num_blocks: int
    k: Any
    v: Any
    extra: dict[str, Any] = field(default_factory=dict)
    rotated_keys: bool = True


@dataclass(frozen=True)
class StoreLayer:
    """What the store op needs to know of a layer: heads, rotation, q and k norms."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    cos: np.ndarray | None
    sin: np.ndarray | None
    q_norm: np.ndarray | None
    k_norm: np.ndarray | None
    qk_norm_eps: float


class KVCache(Strategy):
    """Bookkeeping in Python, storage and ops native.

    A sequence is known by an integer id.  Within a step the engine calls, in this order:
    ``acquire`` (once, when a sequence starts or restarts), ``reserve`` (may fail, then
    nothing changed), then the Program runs, then ``commit`` or ``truncate``.  ``fork`` and
    ``free`` come between steps.  All calls come from one thread.

    Two invariants that ``check_integrity`` must hold at any time between calls: a block is
    free, cached or held by exactly as many sequences as its reference count says; and a
    block that more than one sequence holds is never written.

    What a rollback needs stays until it is certain: a block leaves a window only in
    ``commit``, by the committed length, and only committed tokens are ever shared.

    Attributes:
        share_prefixes: Requests that begin alike hold the common blocks once.
        keeps_sinks: A group's first ``sinks`` tokens stay when they fall out of its window; a
            cache that does not say so is not taken where there are sinks.
        swaps: It has :meth:`swap_out` and what belongs to it; one that does not say so is not taken
            where a swap space is asked for.
    """

    contract = "cache"
    share_prefixes: bool = False
    keeps_sinks: bool = False
    swaps: bool = False
    layout: str
    kv_dtype: str
    block_size: int
    num_blocks: int

    @classmethod
    def undeclared(cls, need: CacheNeeds) -> str | None:
        if any(group.sinks for group in need.groups) and not cls.keeps_sinks:
            return "does not keep attention sinks (keeps_sinks)"
        if need.swap_bytes and not cls.swaps:
            return "has no swap space (swaps)"
        return None

    def __init__(self, needs: CacheNeeds) -> None:
        """Plan the memory; ``CapacityError`` if not even one sequence of one block fits."""
        self.needs = needs

    # -- at load ---------------------------------------------------------------------------
    @abstractmethod
    def add_tensors(self, sink: OpSink) -> list[KVView]:
        """Allocate storage and name it to the Program: one view a layer, in layer order."""

    @abstractmethod
    def add_store_op(self, sink: OpSink, layer: StoreLayer, qkv: Any, kv: KVView) -> None:
        """Add the op that norms and rotates q and k in ``qkv`` (in place) and writes k and v at
        the step's ``slot_mapping``."""

    @abstractmethod
    def add_copy_op(self, sink: OpSink, views: list[KVView]) -> None:
        """Add the op that carries out a step's block copies, before the first layer."""

    @property
    @abstractmethod
    def block_tables(self) -> list[np.ndarray]:
        """Per group int32 ``[max_rows, max_blocks]``, C-contiguous, the same arrays for life."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""

    # -- sequences -------------------------------------------------------------------------
    @abstractmethod
    def acquire(self, seq_id: int, row: int, token_ids: Sequence[int], salt: int = 0) -> int | None:
        """A sequence starts on ``row``.  Takes over what is cached of its prefix and returns
        how many tokens that is (at most ``len(token_ids) - 1``: the last one must run); None:
        its prefix is being computed by another sequence in flight, try again next step.
        ``salt``: everything besides the tokens that changes the KV (an adapter, say).  Who finds
        no room afterwards is freed again, so that nobody waits while holding blocks."""

    @abstractmethod
    def reserve(self, seq_id: int, num_tokens: int) -> bool:
        """Room for the sequence's first ``num_tokens`` tokens, copying on write what is shared
        and would be written.  False: no room, nothing changed."""

    @abstractmethod
    def commit(self, seq_id: int, token_ids: Sequence[int], num_computed: int) -> None:
        """The step is done: the first ``num_computed`` of ``token_ids`` are in the cache; blocks
        that are full may be shared from now on."""

    @abstractmethod
    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Forget all but the first ``num_tokens`` (rejected drafts, a rolled-back step); never
        fewer than ``acquire`` returned."""

    @abstractmethod
    def fork(self, parent_id: int, child_id: int, row: int) -> None:
        """The child holds what the parent holds; written blocks are copied when written."""

    @abstractmethod
    def free(self, seq_id: int) -> None:
        """The sequence leaves (ends, is aborted or preempted)."""

    def swap_out(self, seq_id: int) -> bool:
        """In place of ``free`` when a sequence is preempted: its committed tokens wait in the swap
        space, its blocks are free.  False: no room there, nothing changed."""
        return False

    def swap_in(self, seq_id: int, row: int, token_ids: Sequence[int], num_tokens: int) -> bool:
        """In place of ``acquire`` and ``reserve``: all that was swapped out is back on ``row``, and
        there is room for ``num_tokens``.  False: no room, nothing changed.  The blocks move with
        the step's other copies (``take_copies``); blocks of the swap space are counted on from the
        pool's.  A step that fails may leave them unmade: the engine then discards what waits."""
        raise NotImplementedError

    def discard(self, seq_id: int) -> None:
        """What waits of the sequence in the swap space is forgotten."""

    def swap_bytes(self, seq_id: int) -> int:
        """Bytes that ``swap_out`` would copy."""
        return 0

    @abstractmethod
    def take_copies(self, group: int) -> list[tuple[int, int]]:
        """Block copies (source, destination) to carry out before the next step's first op, in
        this order: a block that was given back and taken again within the step is no hazard."""

    # -- state -----------------------------------------------------------------------------
    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks that ``reserve`` can take now, evictable ones included (the tightest group)."""

    @abstractmethod
    def blocks_needed(self, seq_id: int | None, num_tokens: int) -> int:
        """Blocks that ``reserve(seq_id, num_tokens)`` would take (None: a new sequence)."""

    @abstractmethod
    def max_tokens_per_sequence(self) -> int:
        """The longest sequence that fits when it is alone."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """At least ``num_blocks``, ``num_free_blocks``, ``hit_tokens``, ``query_tokens``."""

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes that no sequence holds."""

    @abstractmethod
    def check_integrity(self) -> None:
        """``AssertionError`` with a reason if an invariant does not hold."""
