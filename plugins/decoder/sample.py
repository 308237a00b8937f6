"""``sample``: one sequence, one token after the other, as its ``SamplingParams`` say."""

from __future__ import annotations

from pyllmlite.hooks.decoder import Decoder


class Sample(Decoder):
    """Greedy or random sampling.  All of it happens in the native sampler; stop rules are the
    engine's; so what was sampled is simply appended, as every decoder does by default."""

    name = "sample"
    priority = 50
