"""``draft-model``: a smaller model of the same vocabulary says what may come."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from pyllmlite.core.errors import ConfigError
from pyllmlite.hooks.decoder import DecoderContext, Proposer
from pyllmlite_plugins.decoder.draft_length import TOKEN_COST, DraftLength

if TYPE_CHECKING:
    from pyllmlite.core.request import Sequence


class DraftModelProposer(Proposer):
    """Speculative decoding with a draft model (Leviathan et al. 2023), whose greedy tokens are
    verified by the engine's rule; as many as the acceptance so far is worth.

    Options, in ``extra``:
        draft_model: Path, alias or hub id; it may be the same model at fewer bits or layers.
        draft_options: A dict of ``LLM``'s options for it (``quantizer``, ``bits``, ``dtype``,
            ``kv_cache_memory``), and ``num_layers``: only its first so many.
        num_speculative_tokens: Of a draft at most; 8.
        draft_token_cost: Time of one more token in a step, as a part of that of a step with one
            token; 0.15.
        draft_step_cost: Time of a step of the draft model, as a part of one of the model; None:
            as their weights' bytes.
    """

    name = "draft-model"
    priority = -1  # only by name

    def __init__(self, context: DecoderContext) -> None:
        super().__init__(context)
        extra = context.extra
        path = extra.get("draft_model")
        options = extra.get("draft_options", {})
        self._longest = extra.get("num_speculative_tokens", 8)
        self._token_cost = extra.get("draft_token_cost", TOKEN_COST)
        step_cost = extra.get("draft_step_cost")
        if not path:
            raise ConfigError("proposer 'draft-model' needs extra={'draft_model': a model}")
        if not isinstance(options, dict):
            raise ConfigError(f"draft_options must be a dict, got {options!r}")
        if type(self._longest) is not int or self._longest < 1:
            raise ConfigError(
                f"num_speculative_tokens must be an integer of at least 1, got {self._longest!r}"
            )
        for name, value in (
            ("draft_token_cost", self._token_cost),
            ("draft_step_cost", step_cost),
        ):
            if value is not None and (not isinstance(value, (int, float)) or not 0 < value < 1):
                raise ConfigError(f"{name} must be in (0, 1), got {value!r}")
        if context.open_model is None:
            raise ConfigError("proposer 'draft-model': this engine opens no second model")
        self._model = context.open_model(path, options)
        if step_cost is None:
            step_cost = self._model.weight_bytes / max(context.weight_bytes, 1)
        self._step_cost = float(step_cost)
        self._lengths: dict[int, DraftLength] = {}
        self._drafts: dict[int, list[int]] = {}

    def open(self, seq: Sequence) -> None:
        self._lengths[seq.id] = DraftLength(1)

    def prepare(self, seqs: Seq[Sequence], max_tokens: Seq[int]) -> None:
        wanted = []
        for seq, room in zip(seqs, max_tokens, strict=True):
            count = self._lengths[seq.id].choose(
                0, len(seqs), self._token_cost, min(room, self._longest), self._step_cost
            )
            if count:
                wanted.append((seq.id, seq.token_ids, count))
            else:
                self._drafts[seq.id] = []
        for (key, _, _), drafts in zip(wanted, self._model.greedy(wanted), strict=True):
            self._drafts[key] = drafts

    def propose(self, seq: Sequence, max_tokens: int) -> Seq[int]:
        if seq.id not in self._drafts:
            self.prepare([seq], [max_tokens])
        return self._drafts.pop(seq.id)[:max_tokens]

    def verified(self, seq: Sequence, num_proposed: int, num_accepted: int) -> None:
        self._lengths[seq.id].learn(num_proposed, num_accepted)

    def close(self, seq: Sequence) -> None:
        self._lengths.pop(seq.id, None)
        self._drafts.pop(seq.id, None)
        self._model.forget(seq.id)
