"""What a model takes in memory before it is loaded: weights by format, keys and values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyllmlite.core.spec import ModelSpec
from pyllmlite.hooks.quantizer import QuantizerNeeds
from pyllmlite.hooks.registry import Registry
from pyllmlite.model.builder import attention_cost, kv_element_bytes
from pyllmlite.model.options import Options
from pyllmlite.model.weights import ExpectedMatrix, expected_matrix, plan_matrices
from pyllmlite.runtime.cost import OpCost
from pyllmlite.runtime.program import OpEntry

if TYPE_CHECKING:
    from pyllmlite.model.source import ModelSource

# Words for what is asked most; any quantizer can be named with its bits besides.
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {"quantizer": "none", "dtype": "bf16"},
    "f32": {"quantizer": "none", "dtype": "f32"},
    "int8": {"quantizer": "rtn", "bits": 8},
    "int4": {"quantizer": "rtn", "bits": 4},
    "nf4": {"quantizer": "nf4"},
}
PARTS = {"embed": "embeddings", "head": "head"}
KV_BLOCK = 16


@dataclass(frozen=True)
class Weights:
    """A model's matrices in one format, not loaded.

    Attributes:
        name: Of the format.
        options: Words of ``LLM(...)`` that ask for it.
        matrices: As they will be packed.
    """

    name: str
    options: dict[str, Any]
    dtype: str
    matrices: tuple[ExpectedMatrix, ...]

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.matrices)

    @property
    def count(self) -> int:
        return sum(matrix.weights for matrix in self.matrices)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(1, self.count)

    def by_part(self) -> dict[str, int]:
        """Bytes of ``layers``, ``embeddings`` and ``head``; with tied embeddings there is no
        head."""
        parts: Counter[str] = Counter({"layers": 0, "embeddings": 0, "head": 0})
        for matrix in self.matrices:
            parts[PARTS.get(matrix.shape.kind, "layers")] += matrix.nbytes
        return dict(parts)

    def labels(self) -> dict[str, int]:
        """Bytes by what is multiplied: ``int4 x int8``."""
        labels: Counter[str] = Counter()
        for matrix in self.matrices:
            labels[matrix.label] += matrix.nbytes
        return dict(labels.most_common())


def weights_in(
    spec: ModelSpec,
    options: dict[str, Any],
    source: ModelSource | None = None,
    name: str = "",
    registry: Registry | None = None,
) -> Weights:
    """The matrices as ``LLM(**options)`` would pack them.

    Args:
        options: ``quantizer``, ``bits``, ``group_size``, ``symmetric``, ``dtype``, ``extra``.
        source: The checkpoint, whose codes are kept where the quantizer keeps them; None: a config
            without one.
    Raises:
        PluginError: No such quantizer, or it cannot do what is asked.
    """
    plans = plan_matrices(spec)
    quantizes = options.get("bits") is not None or options.get("quantizer") not in (
        None,
        "auto",
        "none",
    )
    stored = source.stored_dtype if source is not None else "bf16"
    dtype = options.get("dtype") or "auto"
    if dtype == "auto":
        dtype = "f32" if stored == "f32" and not quantizes else "bf16"
    needs = QuantizerNeeds(
        "cpu",
        dtype,
        tuple(plan.shape for plan in plans),
        options.get("bits"),
        options.get("group_size"),
        options.get("symmetric"),
        Options(options.get("extra") or {}),
    )
    chosen = (registry or Registry.load()).select(
        "quantizer", options.get("quantizer") or "auto", needs
    )
    quantizer = chosen.cls(needs)
    known: dict[Any, tuple[ExpectedMatrix, ...]] = {}
    matrices: list[ExpectedMatrix] = []
    for plan in plans:
        key = (plan.shape.kind, plan.shape.out_features, plan.shape.in_features)
        if source is None and key in known:  # floats: layers of a shape are alike
            made = tuple(
                replace(one, shape=replace(one.shape, name=plan.shape.name)) for one in known[key]
            )
        else:
            made = known[key] = expected_matrix(source, plan, quantizer)
        matrices += made
    return Weights(name or chosen.cls.name, options, dtype, tuple(matrices))


def as_on_gpu(weights: Weights) -> Weights:
    """The same matrices where 4-bit weights are multiplied as bf16 (W4A16), as GPU kernels do."""
    matrices = tuple(
        replace(m, mac_dtype="bf16") if 8 * m.nbytes < 7 * m.weights else m
        for m in weights.matrices
    )
    return replace(weights, matrices=matrices)


@dataclass(frozen=True)
class KV:
    """Keys and values of a model: bytes per element x 2 x layers x KV heads x head size x tokens.

    Attributes:
        element_bytes: Of one element; int8 with its part of the scales.
        windows: Of layers that keep alike their number and the tokens kept, sinks included; None:
            every token.
    """

    dtype: str
    element_bytes: float
    num_kv_heads: int
    head_dim: int
    num_heads: int
    windows: tuple[tuple[int, int | None], ...]

    @property
    def bytes_per_token(self) -> float:
        """Of one token in all layers."""
        layers = sum(count for count, _ in self.windows)
        return self.element_bytes * 2 * layers * self.num_kv_heads * self.head_dim

    def sequence_bytes(self, tokens: int, block: int = KV_BLOCK) -> float:
        """Of one sequence, in whole blocks; layers with a window keep no more than it (and the
        block that is being filled)."""
        one = self.element_bytes * 2 * self.num_kv_heads * self.head_dim
        total = 0.0
        for layers, window in self.windows:
            kept = tokens if window is None else min(tokens, window + block)
            total += layers * one * -(-kept // block) * block
        return total

    def bytes(self, tokens: int, sequences: int) -> float:
        return sequences * self.sequence_bytes(tokens)

    @property
    def mha_factor(self) -> float:
        """How many times as much it would be with as many KV heads as heads (MHA)."""
        return self.num_heads / self.num_kv_heads


def kv_of(spec: ModelSpec, kv_dtype: str) -> KV:
    kept = Counter(
        None if layer.window is None else layer.window + layer.sinks for layer in spec.layers
    )
    return KV(
        dtype=kv_dtype,
        element_bytes=kv_element_bytes(kv_dtype, spec.head_dim),
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        num_heads=spec.num_heads,
        windows=tuple((count, window) for window, count in kept.items()),
    )


def planned_ops(spec: ModelSpec, weights: Weights, kv_dtype: str) -> list[OpEntry]:
    """The ops that the builder would lay out, with their costs and without their weights."""
    ops = [OpEntry("embed", "embed", (), OpCost(token_bytes=4.0 * spec.hidden_size))]
    for matrix in weights.matrices:
        kind = matrix.shape.kind
        if kind == "embed" and not spec.tie_embeddings:
            continue  # a step gathers a few rows of it
        head = kind in ("embed", "head")
        n, k = matrix.shape.out_features, matrix.shape.in_features
        cost = OpCost(
            weight_bytes=matrix.nbytes,
            token_bytes=4.0 * (n + k),
            token_macs=float(n) * k,
            per_logit_row=head,
            mac_dtype=matrix.mac_dtype,
        )
        ops.append(OpEntry("head" if head else matrix.shape.name, "linear", (), cost))
    for i, layer in enumerate(spec.layers):
        at = f"layers.{i}."
        store = OpCost(token_bytes=4.0 * (spec.q_size + 2 * spec.kv_size) * 2)
        ops.append(OpEntry(at + "rotary_store", "rotary_store", (), store))
        cost = attention_cost(spec, kv_dtype, layer)
        ops.append(OpEntry(at + "attention", "attention", (), cost))
    sample = OpCost(token_bytes=4.0 * spec.vocab_size, per_logit_row=True)
    ops.append(OpEntry("sample", "sample", (), sample))
    return ops


def sequences_that_fit(kv: KV, tokens: int, free_bytes: float) -> int:
    one = kv.sequence_bytes(tokens)
    return max(0, int(free_bytes // one)) if one else 0


def longest_that_fits(kv: KV, free_bytes: float, most: int, sequences: int = 1) -> int:
    """Tokens of each of ``sequences``, at most ``most``."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kv.bytes(middle, sequences) <= free_bytes else (low, middle)
    return low
