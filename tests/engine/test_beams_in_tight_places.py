"""Beams with fewer rows than they need: every request ends with what it yields alone."""

from dataclasses import replace

import pytest
from engine_fakes import drain, fake_built

from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.engine import Engine
from pyllmlite_plugins.decoder.beam import Beam


class SmallBeam(Beam):
    def __init__(self, context):
        super().__init__(replace(context, max_logprobs=5))


def outputs(rows, scheduler, clients):
    engine = Engine(fake_built(decoders=[SmallBeam], scheduler=scheduler, max_num_seqs=rows))
    beam = SamplingParams(
        n=2, max_tokens=6, decoder="beam", extra_args={"beam_width": 2}, temperature=1.0
    )
    for i, client in enumerate(clients):
        engine.add(f"beam{i}", {"prompt_token_ids": [5 + i, 6, 7]}, beam, client=client)
    plain = SamplingParams(max_tokens=8, temperature=0)
    engine.add("plain", {"prompt_token_ids": [9, 8, 7]}, plain, client=clients[-1])
    done = drain(engine)
    assert all(output.error is None for output in done.values()), done
    return {name: [c.token_ids for c in output.outputs] for name, output in done.items()}


@pytest.mark.parametrize("scheduler", ["continuous", "static"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("clients", ["aa", "ab", "abc"])
def test_tokens_are_those_of_a_large_engine(rows, scheduler, clients):
    assert outputs(rows, scheduler, clients) == outputs(16, "continuous", clients)
