"""What training takes in memory, before it is begun."""

from __future__ import annotations

from typing import Any

from pyllmlite.compress.learn.settings import TrainSettings
from pyllmlite.core.errors import CapacityError

# Float32 bytes of a trained weight: itself, its gradient, two moments of Adam.
WEIGHT_BYTES, GRADIENT_BYTES, MOMENT_BYTES = 4, 4, 8
LOGITS_CHUNK = 256  # tokens whose logits are in memory at once
_LOGITS_COPIES = 4  # logits, probabilities of both, gradient
_SPARE = 256 << 20  # of the process itself: code, allocator, a batch


def activation_bytes(config: Any, settings: TrainSettings) -> int:
    """Bytes that a micro-batch keeps for its backward pass, an estimate.

    A gated block in float32 keeps about 12 vectors of the hidden size (inputs of both norms and
    of the matrices, queries, keys and values before and after rotation, attention's output) and 4
    of the intermediate size for each token (after Korthikanti et al. 2022, section 4.1, whose
    figures are those of GPT's block in 16 bits); to these come ``LOGITS_CHUNK`` tokens' logits.
    bf16 halves only some of them, as casts are kept beside what they were made of.

    Args:
        config: transformers' config; 0 bytes where it does not say its sizes.
    """
    hidden = getattr(config, "hidden_size", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(hidden, int) or not isinstance(layers, int):
        return 0
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * hidden
    tokens = settings.batch_size * settings.seq_len
    logits = min(tokens, LOGITS_CHUNK) * int(getattr(config, "vocab_size", 0) or 0)
    return 4 * (tokens * layers * (12 * hidden + 4 * inner) + _LOGITS_COPIES * logits)


def check_memory(
    weights: int,
    trained: int,
    config: Any,
    settings: TrainSettings,
    available: int,
    loaded: bool = True,
    others: int = 0,
) -> int:
    """Bytes that a run will take beyond what is in memory.

    Args:
        weights, trained: Numbers of weights, in all and with a gradient.
        available: Bytes that may be taken.
        loaded: The weights are in memory already.
        others: Bytes of whatever stands beside them (a teacher).
    Raises:
        CapacityError: More than there are; says what would do.
    """
    state = trained * (GRADIENT_BYTES + MOMENT_BYTES) + others + _SPARE
    state += 0 if loaded else weights * WEIGHT_BYTES
    activations = activation_bytes(config, settings)
    needed = state + activations
    if needed <= available:
        return needed
    text = (
        f"training {weights / 1e6:.0f} M weights needs {needed / 2**30:.1f} GiB more "
        f"({state / 2**30:.1f} for weights, gradients and optimizer, {activations / 2**30:.1f} for "
        f"{settings.batch_size} sequences of {settings.seq_len} tokens), "
        f"{available / 2**30:.1f} GiB are free: "
    )
    if state + activations / settings.batch_size <= available:
        per = activations / settings.batch_size
        batch = max(int((available - state) / per), 1)
        factor = -(-settings.batch_size // batch)
        accumulation = settings.grad_accumulation * factor
        text += f"batch_size {batch} with grad_accumulation {accumulation} would fit"
    else:
        text += "a smaller student (fewer layers, or narrower) or a smaller seq_len would fit"
    raise CapacityError(text)
