"""``sample``: one sequence, one token after the other, as its ``SamplingParams`` say."""

from __future__ import annotations

from pyllmlite.core.request import Sequence
from pyllmlite.hooks.decoder import Actions, Decoder, StepResult


class Sample(Decoder):
    """Greedy or random sampling.  All of it happens in the native sampler; stop rules are the
    engine's; so what was sampled is simply appended."""

    name = "sample"
    priority = 50

    def advance(self, seq: Sequence, result: StepResult, actions: Actions) -> None:
        actions.append(seq, result.tokens)
