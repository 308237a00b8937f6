"""From a spec, its weights and the chosen strategies to a Program.

Reading order: :func:`build` chooses, :class:`ModelBuilder` lays out the ops.  Every hook is
asked here, once; what runs afterwards is native.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.core.spec import LayerSpec, ModelSpec
from pyllmlite.hooks.attention import AttentionLayer
from pyllmlite.hooks.cache import StoreLayer
from pyllmlite.model.alibi import model_slopes
from pyllmlite.model.rope import rope_tables
from pyllmlite.model.weights import (
    PackedMatrix,
    SplitMatrix,
    load_matrix,
    padded_intermediate,
    plan_matrices,
)
from pyllmlite.runtime.cost import OpCost
from pyllmlite.runtime.native import native
from pyllmlite.runtime.program import ITEM_BYTES, Buffer, ProgramBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyllmlite import _native
    from pyllmlite.core.spec import RopeSpec
    from pyllmlite.hooks.attention import Attention
    from pyllmlite.hooks.cache import KVCache, KVView
    from pyllmlite.hooks.quantizer import Quantizer
    from pyllmlite.model.source import ModelSource

log = logging.getLogger("pyllmlite")


class ModelBuilder:
    """Lays one model out as a flat list of ops.

    Args:
        source: Where weights are read from.
        spec: The model: the source's, or with what was laid on it (a window).
        max_model_len: Positions that rotary tables are made for.
        sink: Takes buffers and ops.
    """

    def __init__(
        self,
        source: ModelSource,
        spec: ModelSpec,
        sink: ProgramBuilder,
        quantizer: Quantizer,
        cache: KVCache,
        attention: Attention,
        max_model_len: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.source = source
        self.spec = spec
        self.sink = sink
        self.quantizer = quantizer
        self.cache = cache
        self.attention = attention
        self.max_model_len = max_model_len
        self.progress = progress
        self.matrices: dict[str, PackedMatrix | SplitMatrix] = {}
        self._ropes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def weight_bytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices.values())

    def weight_formats(self) -> dict[str, int]:
        """Bytes by what is multiplied: the weights' format and the inputs'."""
        bytes_of: Counter[str] = Counter()
        for matrix in self.matrices.values():
            for part in matrix.parts if isinstance(matrix, SplitMatrix) else (matrix,):
                bytes_of[part.label] += part.nbytes
        return dict(bytes_of.most_common())

    def load_weights(self) -> None:
        """Read, quantize and pack every matrix, one at a time."""
        plans = plan_matrices(self.spec)
        for done, plan in enumerate(plans):
            self.matrices[plan.shape.name] = load_matrix(self.source, plan, self.quantizer)
            if self.progress is not None:
                self.progress(done + 1, len(plans))

    def add_ops(self) -> None:
        """The whole model, from token ids to sampled tokens."""
        spec, sink = self.spec, self.sink
        views = self.cache.add_tensors(sink)
        self.cache.add_copy_op(sink, views)
        x = sink.buffer("hidden", spec.hidden_size)
        qkv = sink.buffer("qkv", spec.q_size + 2 * spec.kv_size)
        context = sink.buffer("context", spec.q_size)
        inner = sink.buffer("inner", padded_intermediate(spec))
        branch = sink.buffer("branch", spec.hidden_size) if spec.post_norms else None
        logits = sink.buffer("logits", spec.vocab_size, rows="logits")
        self._embed(x)
        for i in range(spec.num_layers):
            self._attention(i, x, qkv, context, branch, views[i])
            self._mlp(i, x, inner, branch)
        self._head(x, logits)
        sink.op(
            native().sample(spec.vocab_size),
            [logits],
            "sample",
            OpCost(token_bytes=4.0 * spec.vocab_size, per_logit_row=True),
        )

    # -- parts of the model ------------------------------------------------------------------
    def _embed(self, x: Buffer) -> None:
        spec, table = self.spec, self.matrices["embed"]
        assert isinstance(table, PackedMatrix)  # a matrix of one part is never split
        positions = self._vector("position_embed") if spec.learned_positions else None
        op = native().embed(
            table.packed,
            scale=spec.embedding_scale,
            position_table=positions,
            position_offset=spec.position_offset,
        )
        per_row = table.nbytes / spec.vocab_size
        self.sink.op(op, [x], "embed", OpCost(token_bytes=per_row + 4.0 * spec.hidden_size))
        if spec.embed_norm:
            self._norm_op("embed_norm", x, x, residual=False)

    def _attention(
        self, i: int, x: Buffer, qkv: Buffer, context: Buffer, branch: Buffer | None, kv: KVView
    ) -> None:
        spec, at = self.spec, f"layers.{i}."
        bias = self._fused_bias([at + "q.bias", at + "k.bias", at + "v.bias"])
        self._linear(at + "qkv", x, qkv, norm=at + "attn_norm", bias=bias)
        rope = spec.layers[i].rope
        cos, sin = self._rope(rope) if rope is not None else (None, None)
        store = StoreLayer(
            index=i,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            rotary_dim=rope.rotary_dim if rope is not None else 0,
            cos=cos,
            sin=sin,
            q_norm=self._vector(at + "q_norm") if spec.qk_norm else None,
            k_norm=self._vector(at + "k_norm") if spec.qk_norm else None,
            qk_norm_eps=spec.norm.eps,
        )
        self.cache.add_store_op(self.sink, store, qkv, kv)
        layer = AttentionLayer(
            index=i,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.scale,
            window=spec.layers[i].window,
            softcap=spec.attention_softcap,
            alibi_slopes=model_slopes(spec),
            rotary_dim=store.rotary_dim,
            cos=cos,
            sin=sin,
            sinks=spec.layers[i].sinks,
        )
        first = len(self.sink.entries)
        self.attention.add_ops(self.sink, layer, qkv, context, kv)
        self.sink.default_cost(first, attention_cost(spec, kv.dtype, spec.layers[i]))
        self._branch_out(at + "attn_out", at + "post_attn_norm", context, x, branch)

    def _mlp(self, i: int, x: Buffer, inner: Buffer, branch: Buffer | None) -> None:
        spec, at = self.spec, f"layers.{i}."
        if spec.gated:
            bias = self._fused_bias([at + "gate.bias", at + "up.bias"], pad_to=inner.width)
            name = at + "gate_up"
        else:
            bias = self._fused_bias([at + "up.bias"], pad_to=inner.width)
            name = at + "mlp_up"
        self._linear(
            name,
            x,
            inner,
            norm=at + "mlp_norm",
            bias=bias,
            activation=spec.activation,
            gated=spec.gated,
        )
        self._branch_out(at + "mlp_down", at + "post_mlp_norm", inner, x, branch)

    def _branch_out(
        self, name: str, post_norm: str, value: Buffer, x: Buffer, branch: Buffer | None
    ) -> None:
        """Project back and add to the residual stream, through the post norm where there is one."""
        bias = self._vector(name.replace("mlp_down", "down") + ".bias")
        if branch is None:
            self._linear(name, value, x, bias=bias, residual=True)
            return
        self._linear(name, value, branch, bias=bias)
        self._norm_op(post_norm, branch, x, residual=True)

    def _head(self, x: Buffer, logits: Buffer) -> None:
        spec = self.spec
        self._linear(
            "embed" if spec.tie_embeddings else "head",
            x,
            logits,
            norm="final_norm",
            bias=self._vector("head.bias"),
            softcap=spec.final_softcap,
            output_scale=spec.logit_scale,
            logit_rows=True,
            op_name="head",
        )

    # -- single ops --------------------------------------------------------------------------
    def _linear(
        self,
        name: str,
        source: Buffer,
        out: Buffer,
        norm: str | None = None,
        op_name: str | None = None,
        **options: Any,
    ) -> None:
        matrix = self.matrices[name]
        if norm is not None:
            options["norm"] = self._norm_args(norm)
        if isinstance(matrix, SplitMatrix):
            self._split_linear(name, matrix, source, out, options)
        else:
            self._linear_op(op_name or name, matrix, source, out, options)

    def _split_linear(
        self, name: str, matrix: SplitMatrix, source: Buffer, out: Buffer, options: dict[str, Any]
    ) -> None:
        """Parts that were quantized each in its own way: an op a part.  q, k and v write columns of
        one buffer; gate is activated, then up multiplies it."""
        gated, bias = options.pop("gated", False), options.pop("bias", None)
        first = 0
        for i, part in enumerate(matrix.parts):
            rows = part.packed.shape[0]
            own = dict(options)
            if bias is not None:
                own["bias"] = bias[first : first + rows]
            target = out
            if gated and i == 1:
                own.update(activation="none", multiply=True)
            elif not gated:
                target = self.sink.columns(f"{out.name}.{i}", out, first, rows)
            self._linear_op(f"{name}.{i}", part, source, target, own)
            first += rows

    def _linear_op(
        self,
        name: str,
        matrix: PackedMatrix,
        source: Buffer,
        out: Buffer,
        options: dict[str, Any],
    ) -> None:
        op = native().linear(**matrix.op_arguments(), **options)
        n, k = matrix.packed.shape
        residual = 4.0 * out.width if options.get("residual") else 0.0
        cost = OpCost(
            weight_bytes=matrix.nbytes,
            token_bytes=4.0 * (source.width + out.width) + residual,
            token_macs=float(n) * k,
            per_logit_row=bool(options.get("logit_rows")),
            mac_dtype=matrix.mac_dtype,
        )
        self.sink.op(op, [source, out], name, cost)

    def _norm_op(self, name: str, source: Buffer, out: Buffer, residual: bool) -> None:
        op = native().norm(self._norm_args(name), source.width, residual)
        self.sink.op(op, [source, out], name, OpCost(token_bytes=8.0 * source.width))

    def _norm_args(self, name: str) -> _native.NormArgs:
        weight, bias = self._vector(name + ".weight"), self._vector(name + ".bias")
        return native().NormArgs(self.spec.norm.kind, self.spec.norm.eps, weight, bias)

    def _vector(self, name: str) -> np.ndarray | None:
        value = self.source.get(name) if self.source.has(name) else None
        return None if value is None else np.ascontiguousarray(value, dtype=np.float32)

    def _fused_bias(self, names: list[str], pad_to: int | None = None) -> np.ndarray | None:
        parts = []
        for name in names:
            part = self._vector(name)
            if part is None:
                return None
            if pad_to is not None and part.size < pad_to:
                part = np.concatenate([part, np.zeros(pad_to - part.size, np.float32)])
            parts.append(part)
        return np.concatenate(parts)

    def _rope(self, rope: RopeSpec) -> tuple[np.ndarray, np.ndarray]:
        key = id(rope)  # layers share the RopeSpec object, and so its tables
        if key not in self._ropes:
            self._ropes[key] = rope_tables(rope, self.max_model_len)
        return self._ropes[key]


def kv_element_bytes(kv_dtype: str, head_dim: int, otherwise: float = 2) -> float:
    """Bytes of one element of K or V; ``int8`` with its part of the float32 scale that a token's
    head has.  ``otherwise``: of a dtype that is not known here."""
    if kv_dtype == "int8":
        return 1 + 4 / head_dim
    return ITEM_BYTES.get(kv_dtype, otherwise)


def attention_cost(spec: ModelSpec, kv_dtype: str, layer: LayerSpec) -> OpCost:
    """Of one layer: a decode step reads K and V of every sequence; each (token, key) pair costs
    ``2 * heads * head_dim`` multiply-accumulates, of the dtype that K and V are kept in.  With int8
    twice as many: queries and weights have 16 bits, taken as two bytes."""
    halves = 2 if kv_dtype == "int8" else 1
    return OpCost(
        token_bytes=8.0 * spec.q_size,
        context_bytes=2.0 * spec.kv_size * kv_element_bytes(kv_dtype, spec.head_dim),
        context_macs=2.0 * spec.q_size * halves,
        mac_dtype=kv_dtype if kv_dtype in ("f32", "int8") else "bf16",
        window=0 if layer.window is None else layer.window + layer.sinks,
    )
