"""Divergences between a teacher's next-token distribution p and a student's q, in nats.

``forward`` is KL(p || q): the student spreads over all that the teacher holds possible.
``reverse`` is KL(q || p): it keeps to what the teacher holds likely (Gu et al. 2024, MiniLLM).

**Temperature.**  Both distributions are softmax(logits / T), and the divergence is multiplied by
T^2: the gradient by a logit falls with 1 / T^2 (Hinton et al. 2015, section 2.1), so that the mix
with the task's loss keeps its meaning whatever T is.

**Top-k.**  Of the teacher only the k largest logits and the log of the whole sum are known.  What
remains of p, the *tail* (mass t), stands as one more outcome, whose probability under q is that
of all tokens outside the k together.  Such a divergence is never above the full one (log-sum
inequality); it is below by t times the divergence of the two tails, and its gradient by the
student's logits differs from the full one's by at most 2 t in the sum of absolute values (times T
after the factor T^2).

Everything here works row by row on ``[..., vocab]`` in the dtype it is given, float32 or float64,
and is held to plain formulas in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORE = -100  # a target that counts for nothing, as in transformers
DIRECTIONS = ("forward", "reverse")


def full_divergence(
    student: Any, teacher: Any, temperature: float = 1.0, direction: str = "forward"
) -> Any:
    """T^2 times the divergence of whole distributions.

    Args:
        student, teacher: Logits ``[..., vocab]``; a gradient flows to whichever asks for one.
        direction: ``forward`` or ``reverse``.
    Returns:
        ``[...]``, nats.
    """
    q = functional.log_softmax(student / temperature, -1)
    p = functional.log_softmax(teacher / temperature, -1)
    return temperature**2 * _divergence(p, q, direction)


def _divergence(p: Any, q: Any, direction: str) -> Any:
    """Of log-probabilities, summed over the last axis; 0 log 0 is 0, in the gradient too."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be forward or reverse, got {direction!r}")
    left, right = (p, q) if direction == "forward" else (q, p)
    some = left > -torch.inf
    zero = torch.zeros_like(left)
    ratio = torch.where(some, left, zero) - torch.where(some, right, zero)
    return (left.exp() * ratio).sum(-1)


def topk_divergence(
    student: Any,
    ids: Any,
    log_probs: Any,
    temperature: float = 1.0,
    direction: str = "forward",
    tail: Any = None,
) -> Any:
    """T^2 times the divergence with everything outside the k tokens as one outcome.

    Args:
        student: Logits ``[..., vocab]``.
        ids: The teacher's k likeliest tokens ``[..., k]``, int64, no id twice.
        log_probs: Their log-probabilities under softmax(teacher's logits / T), ``[..., k]``.
        tail: Log of the mass outside them ``[...]``; None: what they leave of 1.  Where both are
            rounded they are scaled to sum to 1.
    Returns:
        ``[...]``, nats.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be forward or reverse, got {direction!r}")
    if tail is None:
        tail = tail_log_prob(log_probs)
    if ids.shape[-1] == student.shape[-1]:
        tail = torch.full_like(tail, -torch.inf)
    p = torch.log_softmax(torch.cat([log_probs, tail[..., None]], -1), -1)
    return _TopK.apply(student, ids, p, temperature, direction)


class _TopK(torch.autograd.Function):
    """With a gradient of its own: one exponential of the vocabulary instead of two, and two copies
    of it in memory instead of six.

    With q over the k tokens and the tail, q_t the tail's mass and L the divergence, the gradient
    by scaled logit j is, forward, q_j - p_j for one of the k and q_j (1 - p_t / q_t) for one of
    the tail; reverse, q_j (log(q_j / p_j) - L) and q_j (log(q_t / p_t) - L).
    """

    @staticmethod
    def forward(
        ctx: Any, student: Any, ids: Any, p: Any, temperature: float, direction: str
    ) -> Any:
        scaled = student / temperature if temperature != 1 else student
        log_sum = scaled.logsumexp(-1, keepdim=True)
        kept = scaled.gather(-1, ids) - log_sum
        # The tail is summed itself: 1 - sum(q) would be rounding where q is sharp.
        rest = (scaled - log_sum).exp_().scatter_(-1, ids, 0.0)
        mass = rest.sum(-1, keepdim=True)
        least = torch.finfo(student.dtype).tiny
        q = torch.cat([kept, mass.clamp_min(least).log()], -1)
        if ids.shape[-1] == student.shape[-1]:
            q[..., -1] = -torch.inf
        value = _divergence(p, q, direction)
        ctx.save_for_backward(ids, p, q, rest, value)
        ctx.temperature, ctx.forward_direction = temperature, direction == "forward"
        return temperature**2 * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_value: Any) -> Any:
        ids, p, q, rest, value = ctx.saved_tensors
        tail_there = q[..., -1:] > -torch.inf
        if ctx.forward_direction:
            inside = q[..., :-1].exp() - p[..., :-1].exp()
            outside = 1 - (p[..., -1:] - q[..., -1:]).exp()
        else:
            inside = q[..., :-1].exp() * (q[..., :-1] - p[..., :-1] - value[..., None])
            outside = q[..., -1:] - p[..., -1:] - value[..., None]
        outside = torch.where(tail_there, outside, torch.zeros_like(outside))
        times = ctx.temperature * by_value[..., None]  # T^2 / T
        gradient = (rest * (outside * times)).scatter_(-1, ids, inside * times)
        return gradient, None, None, None, None


def tail_log_prob(log_probs: Any) -> Any:
    """log(1 - sum exp(log_probs)) over the last axis; at least the rounding of the sum."""
    least = torch.finfo(log_probs.dtype).eps
    mass = log_probs.exp().sum(-1)
    return torch.log((1 - mass).clamp_min(least))


def cross_entropy(student: Any, targets: Any) -> Any:
    """The task's loss: ``-log q(target)`` at T = 1, nats ``[...]``; 0 where the target is
    :data:`IGNORE`."""
    flat = functional.cross_entropy(
        student.reshape(-1, student.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORE,
        reduction="none",
    )
    return flat.view(targets.shape)


def mixed_loss(
    student: Any,
    targets: Any,
    divergence: Any,
    task_weight: float,
) -> tuple[Any, dict[str, float]]:
    """``(1 - task_weight) * divergence + task_weight * cross entropy``, mean over the targets
    that count, and both parts as metrics (with ``tokens``).

    Args:
        student: Logits ``[..., vocab]``.
        targets: ``[...]``, :data:`IGNORE` where nothing is learnt.
        divergence: ``[...]``.
        task_weight: In [0, 1].
    """
    counted = targets != IGNORE
    tokens = int(counted.sum())
    entropy = cross_entropy(student, targets).sum() / max(tokens, 1)
    kl = torch.where(counted, divergence, torch.zeros_like(divergence)).sum() / max(tokens, 1)
    loss = (1 - task_weight) * kl + task_weight * entropy
    metrics = {"kl": float(kl.detach()), "cross_entropy": float(entropy.detach())}
    return loss, {**metrics, "tokens": float(tokens)}
