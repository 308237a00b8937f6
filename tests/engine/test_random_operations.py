"""10,000 random operations: nothing leaks, nobody gets a wrong token."""

import random

import pytest
from engine_fakes import VOCAB, drain, fake_built, fake_logits
from test_engine import Guess, Rising

from pyllmlite.core.request import Status
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.engine import Engine


def is_greedy(prompt, token_ids, rising=False):
    """Would greedy decoding have drawn these tokens?"""
    ids = list(prompt)
    for token in token_ids:
        logits = fake_logits(ids)
        if rising and len(ids) > len(prompt):
            logits[: ids[-1] + 1] = -float("inf")
        if int(logits.argmax()) != token:
            return False
        ids.append(token)
    return True


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, {}),
        (1, {"cache": "contiguous", "num_blocks": 24}),
        (2, {"proposer": Guess}),
        (3, {"scheduler": "static"}),
        (4, {"prefix_caching": False}),
    ],
)
def test_random_operations(seed, options):
    Guess.seen = []
    draw = random.Random(seed)
    built = fake_built(
        **{
            "max_num_seqs": 6, "max_model_len": 64, "max_num_batched_tokens": 20,
            "num_blocks": 13, "constraints": [Rising], **options,
        }
    )  # fmt: skip
    engine = Engine(built)
    prefixes = [[draw.randrange(95) for _ in range(40)] for _ in range(3)]
    checked = count = 0

    def check(states):
        nonlocal checked
        for state in states:
            rising = bool(state.constraints)
            for seq in state.request.sequences:
                assert seq.status is Status.FINISHED
                if state.request.params.temperature == 0 and checked % 4 == 0:
                    assert is_greedy(seq.token_ids[: seq.num_prompt_tokens],
                                     seq.output_token_ids, rising)  # fmt: skip
                checked += 1

    for number in range(2000):
        action = draw.random()
        live = list(engine.requests)
        if action < 0.25 and len(live) < 14:
            prompt = draw.choice(prefixes)[: draw.randrange(1, 40)]
            if draw.random() < 0.5:
                prompt = prompt + [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 20))]
            n = draw.choice([1, 1, 1, 3])
            engine.add(
                str(count),
                prompt,
                SamplingParams(
                    temperature=1.0 if n > 1 else draw.choice([0, 0.9]),
                    n=n,
                    max_tokens=draw.choice([1, 4, 20, None]),
                    prompt_logprobs=draw.choice([None, None, 1]),
                    logprobs=draw.choice([None, 1]),
                    stop=draw.choice([None, "e"]),
                    extra_args={"rising": draw.random() < 0.1},
                ),
                stream=draw.random() < 0.3,
            )
            count += 1
        elif action < 0.29 and live:
            engine.abort(draw.choice(live))
        elif action < 0.33 and engine.pool.running:
            engine.pool.preempt(draw.choice(engine.pool.running))
        elif action < 0.34:
            built.cache.reset_prefix_cache()
        elif action < 0.345:
            def fail(batch):
                built.program.before = lambda batch: None
                raise RuntimeError("now and then a step fails")

            built.program.before = fail
        else:
            check(s for s in engine.step() if s.live == 0 and s.request.error is None)
        if number % 10 == 0:
            engine.check_integrity()
    drain(engine)
    assert count > 50 and checked > 50
    engine.check_integrity()
    assert built.cache.num_free_blocks == built.cache.num_blocks
    assert len(engine.pool.free_rows) == 6 and engine._special == 0
