"""A prompt whose last token runs by itself looks like decoding, but has more to do: births and
scores.  No draft may stand behind it."""

import pytest
from engine_fakes import VOCAB, drain, fake_built

from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.engine import Engine
from pyllmlite.hooks.decoder import Proposer


class Wrong(Proposer):
    name = "wrong"

    def propose(self, seq, max_tokens):
        return [len(seq.token_ids) % VOCAB] * 3


@pytest.mark.parametrize(
    "ask",
    [
        {"n": 3, "temperature": 1.0, "seed": 5},
        {"prompt_logprobs": 2, "logprobs": 1, "temperature": 0},
        {"n": 2, "prompt_logprobs": 0, "temperature": 1.0, "seed": 6},
    ],
    ids=str,
)
def test_the_last_token_of_a_prompt_alone_in_its_step(ask):
    params = SamplingParams(max_tokens=10, ignore_eos=True, **ask)
    outputs = []
    for proposer in (None, Wrong):
        built = fake_built(proposer=proposer, max_num_batched_tokens=12, max_logit_rows=12)
        engine = Engine(built)
        engine.add("a", list(range(40, 53)), params)
        outputs.append(drain(engine)["a"])
        assert built.cache.num_free_blocks == built.cache.num_blocks
    plain, drafted = outputs
    assert len(plain.outputs) == params.n
    assert drafted.outputs == plain.outputs
    assert drafted.prompt_logprobs == plain.prompt_logprobs
