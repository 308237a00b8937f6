"""Losses over a large vocabulary without its logits in memory.

Small models spend more on the output matrix than on any layer, and the logits of a batch (tokens x
vocabulary, several copies for a divergence) would be most of its memory.  Here a chunk of tokens
at a time goes through the matrix, the loss and its gradient, and only the gradients by the hidden
states and by the matrix are kept: three multiplications by the matrix, as without chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyllmlite.compress.learn.memory import LOGITS_CHUNK


class Head:
    """The output side of transformers' causal language model.

    Args:
        module: ``...ForCausalLM``.

    ``body(input_ids, **more)`` gives the hidden states behind the last norm ``[batch, length,
    hidden]``; calling it with some of them ``[tokens, hidden]`` gives float32 logits.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.linear = module.get_output_embeddings()
        config = module.config
        self.softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)

    def body(self, input_ids: Any, **more: Any) -> Any:
        found = self.module.base_model(input_ids=input_ids, use_cache=False, **more)
        return found.last_hidden_state

    def __call__(self, hidden: Any) -> Any:
        logits = _at_least_float32(self.linear(hidden)) * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @property
    def trained(self) -> list[Any]:
        return [p for p in self.linear.parameters() if p.requires_grad]


# (hidden states of a chunk, first, last) to (the sum of its losses, sums of metrics).
ChunkLoss = Callable[[Any, int, int], tuple[Any, dict[str, float]]]


def chunked_sum(
    hidden: Any, loss: ChunkLoss, parameters: list[Any], chunk: int = LOGITS_CHUNK
) -> tuple[Any, dict[str, float]]:
    """The sum of ``loss`` over chunks of ``hidden`` ``[tokens, hidden]``, and of the metrics.

    Args:
        parameters: All parameters that ``loss`` uses and that want a gradient.
    """
    sums: dict[str, float] = {}

    def run(part: Any, first: int, last: int) -> Any:
        value, metrics = loss(part, first, last)
        for name, number in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(number)
        return value

    wanted = [p for p in parameters if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or wanted):
        return _Chunked.apply(hidden, run, chunk, *wanted), sums
    total = _at_least_float32(hidden.new_zeros(()))
    for first, last in _chunks(len(hidden), chunk):
        total = total + run(hidden[first:last], first, last)
    return total, sums


def _at_least_float32(values: Any) -> Any:
    return values if values.dtype == torch.float64 else values.float()


def _chunks(count: int, chunk: int) -> list[tuple[int, int]]:
    return [(first, min(first + chunk, count)) for first in range(0, count, chunk)]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Any, run: Any, chunk: int, *parameters: Any) -> Any:
        by_hidden = torch.zeros_like(hidden)
        gradients = [torch.zeros_like(p) for p in parameters]
        total = _at_least_float32(hidden.new_zeros(()))
        for first, last in _chunks(len(hidden), chunk):
            with torch.enable_grad():
                part = hidden[first:last].detach().requires_grad_(True)
                value = run(part, first, last)
            mine, *others = torch.autograd.grad(value, [part, *parameters])
            by_hidden[first:last] = mine
            for gradient, other in zip(gradients, others, strict=True):
                gradient += other
            total = total + value.detach()
        ctx.save_for_backward(by_hidden, *gradients)
        return total

    @staticmethod
    def backward(ctx: Any, by_total: Any) -> Any:  # type: ignore[override]
        by_hidden, *gradients = ctx.saved_tensors
        return by_hidden * by_total, None, None, *(g * by_total for g in gradients)
