"""What an op costs: bytes it moves and multiply-accumulates it does, as functions of the step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpCost:
    """Linear in the step's shape, so that the roofline can be drawn for any batch.

    Attributes:
        weight_bytes: Read once a step, however many tokens.
        token_bytes: Activations read and written per token (or per logit row).
        token_macs: Multiply-accumulates per token (or per logit row).
        context_bytes: KV bytes read per sequence and token of context in decode.
        context_macs: Multiply-accumulates per token and token of context.
        per_logit_row: ``token_*`` count rows that want logits, not tokens.
        mac_dtype: What is multiplied: ``int8``, ``bf16`` or ``f32``.
        window: Tokens of context that a token sees at most; 0: all.
    """

    weight_bytes: float = 0
    token_bytes: float = 0
    token_macs: float = 0
    context_bytes: float = 0
    context_macs: float = 0
    per_logit_row: bool = False
    mac_dtype: str = "f32"
    window: int = 0

    def visible(self, context: int) -> int:
        """Keys that a token with ``context`` tokens (its own included) behind it sees."""
        return min(context, self.window or context)

    def bytes(self, tokens: int, logit_rows: int, contexts: list[int]) -> float:
        """Bytes of one step; ``contexts``: the context length of each sequence."""
        rows = logit_rows if self.per_logit_row else tokens
        keys = sum(self.visible(context) for context in contexts)
        return self.weight_bytes + rows * self.token_bytes + keys * self.context_bytes

    def macs(self, tokens: int, logit_rows: int, context_pairs: float) -> float:
        """Multiply-accumulates of one step; ``context_pairs``: (token, visible key) pairs."""
        rows = logit_rows if self.per_logit_row else tokens
        return rows * self.token_macs + context_pairs * self.context_macs
