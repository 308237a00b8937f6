"""A module in training writes: what the engine does for finished models, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pyllmlite.compress.learn.losses import IGNORE


@dataclass
class Written:
    """What was written, as a batch.

    Attributes:
        batch: ``input_ids`` ``[batch, length]``, padded on the left of the prompts and on the right
            of the answers; ``targets`` of the same shape, the answers' tokens.
        arguments: ``attention_mask`` and ``position_ids`` that belong to it.
    """

    batch: dict[str, Any]
    arguments: dict[str, Any]


def sample(
    module: Any,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float = 1.0,
    eos: tuple[int, ...] = (),
) -> Written:
    """Answer prompts with torch's global random numbers; greedily if ``temperature`` is 0.

    Args:
        module: transformers' causal language model; its mode is put back.
        prompts: Token ids, none of them empty.
        max_tokens: Of an answer at most.
        eos: Tokens that end one; they count as its last token.
    """
    from transformers import DynamicCache

    device = next(module.parameters()).device
    width = max(len(ids) for ids in prompts)
    tokens = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    ends = torch.tensor(eos, dtype=torch.long, device=device)
    open_rows = torch.ones(len(prompts), dtype=torch.bool, device=device)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            cache = DynamicCache(config=module.config)
            step = tokens
            for _ in range(max_tokens):
                places = _positions(mask)[:, -step.shape[1] :]
                logits = module(
                    input_ids=step, attention_mask=mask, position_ids=places,
                    past_key_values=cache, use_cache=True, logits_to_keep=1,
                ).logits[:, -1].float()  # fmt: skip
                if temperature:
                    chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
                else:
                    chosen = logits.argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, chosen * open_rows[:, None]], 1)
                mask = torch.cat([mask, open_rows[:, None].long()], 1)
                open_rows = open_rows & ~torch.isin(chosen[:, 0], ends)
                if not open_rows.any():
                    break
                step = tokens[:, -1:]
    finally:
        module.train(was_training)
    answered = mask.bool()
    answered[:, :width] = False
    targets = torch.where(answered, tokens, torch.full_like(tokens, IGNORE))
    seen = mask[:, :-1]
    return Written(
        {"input_ids": tokens[:, :-1], "targets": targets[:, 1:]},
        {"attention_mask": seen, "position_ids": _positions(seen)},
    )


def _positions(mask: Any) -> Any:
    """Of each token among those of its row that count, from 0."""
    return (mask.cumsum(-1) - 1).clamp_min(0)
