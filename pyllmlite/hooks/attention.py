"""Attention: how queries read keys and values."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyllmlite.hooks.strategy import Strategy

if TYPE_CHECKING:
    import numpy as np

    from pyllmlite.hooks.cache import KVView
    from pyllmlite.hooks.sink import OpSink


@dataclass(frozen=True)
class AttentionNeeds:
    """What the model and the cache ask of an attention.  ``kv_layout`` and ``kv_dtype`` are the
    cache's words (open vocabularies): a layout you do not know is a layout you do not read."""

    device: str  # "cpu" | "cuda"
    dtype: str  # "f32" | "bf16": the model's
    head_dim: int
    num_heads: int
    num_kv_heads: int
    kv_layout: str
    kv_dtype: str
    block_size: int
    window: bool = False
    alibi: bool = False
    softcap: bool = False
    sinks: int = 0


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention.

    Attributes:
        index: Layer number.
        scale: Multiplies q.k.
        window: Tokens seen, itself included; None: all before.
        sinks: First tokens of the sequence that are seen besides.  Positions are then those within
            the cache, as in StreamingLLM (Xiao et al. 2023, section 3.2): what lies between sinks
            and window does not count, neither for the rotation nor for ALiBi's distance.  Keys in
            the cache are rotated at their place in the sequence, so that those in the window need
            nothing; a query meets the sinks rotated at ``window + sinks - 1``.
        softcap: > 0: scores become ``softcap * tanh(scores / softcap)``.
        alibi_slopes: float32 ``[num_heads]`` or None: adds ``slope * (key - query position)``
            (Press et al. 2022).
        rotary_dim, cos, sin: The layer's rotation (as in ``StoreLayer``), for sinks, and for an
            attention that reads keys which are stored before it (``KVView.rotated_keys`` False);
            one that cannot raises ``PluginError`` in ``add_ops``.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float
    alibi_slopes: np.ndarray | None
    rotary_dim: int = 0
    cos: np.ndarray | None = None
    sin: np.ndarray | None = None
    sinks: int = 0


class Attention(Strategy):
    """Adds one layer's attention to the Program.

    Called at load, once a layer.  At run time only the ops that it added run.

    Attributes:
        reads_sinks: It does what ``AttentionLayer.sinks`` asks; one that does not say so is not
            taken where there are sinks.
    """

    contract = "attention"
    reads_sinks: bool = False

    @classmethod
    def undeclared(cls, need: AttentionNeeds) -> str | None:
        if need.sinks and not cls.reads_sinks:
            return "does not read attention sinks (reads_sinks)"
        return None

    @abstractmethod
    def add_ops(
        self, sink: OpSink, layer: AttentionLayer, qkv: Any, out: Any, kv: KVView
    ) -> None:
        """Add the ops that compute ``out`` from ``qkv`` and the cache.

        Args:
            sink: Takes ops; owns every buffer.
            qkv: f32 ``[tokens, (num_heads + 2 num_kv_heads) * head_dim]``: rotated queries
                first; keys and values are already in the cache when your op runs.
            out: f32 ``[tokens, num_heads * head_dim]``, written whole.
            kv: The cache's tensors of this layer, their layout, dtype and group.

        Where ``block_table`` is -1 the block is not held (it left the window): do not read it.

        The op sees ``block_table``, ``slot_mapping``, ``seq_lens``, ``query_start_loc`` and
        ``positions`` in the step's batch.
        """
        raise NotImplementedError
