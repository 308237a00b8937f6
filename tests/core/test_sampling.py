"""Sampling parameters that cannot work are refused in one line; those at the edge work."""

import numpy as np
import pytest
from text_model import write_text_model

from pyllmlite.core.errors import RequestError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.llm import LLM


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"logit_bias": [1, 2]}, "logit_bias must be a dict"),
        ({"logit_bias": {1: "x"}}, "logit_bias maps token ids"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias maps token ids"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty must be in"),
        ({"temperature": 0, "n": 2}, "n > 1 with temperature 0"),
        ({"n": 10**9}, "n must be at most 16384"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
def test_refused(params, words):
    with pytest.raises(RequestError, match=words) as error:
        SamplingParams(**params)
    assert "\n" not in str(error.value)


def test_numpys_numbers_are_numbers():
    params = SamplingParams(temperature=np.float32(0.5), max_tokens=np.int64(4), seed=np.int32(3))
    assert (params.temperature, params.max_tokens, params.seed) == (0.5, 4, 3)
    assert type(params.max_tokens) is int


def test_a_clone_goes_its_own_way():
    params = SamplingParams(stop="a", logit_bias={1: 2.0})
    other = params.clone()
    assert other == params
    other.stop.append("b")
    other.logit_bias[3] = 1.0
    assert params == SamplingParams(stop="a", logit_bias={1: 2.0})


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 2**40},
        {"top_p": 1e-300},
        {"temperature": 1e-300},
        {"temperature": 1e6},
        {"repetition_penalty": 1e-6},
        {"repetition_penalty": 1e6},
        {"min_tokens": 2**40, "max_tokens": None},
        {"max_tokens": 2**80},
        {"seed": -(2**80)},
        {"extra_args": None},
        {"stop_token_ids": (1, 2), "ignore_eos": True},
    ],
    ids=str,
)
def test_at_the_edge(tmp_path, params):
    llm = LLM(str(write_text_model(tmp_path / "m")), max_model_len=32, max_num_seqs=2, threads=1)
    (output,) = llm.generate("abc", SamplingParams(**params), use_tqdm=False)
    assert output.error is None and output.outputs[0].finish_reason in ("length", "stop")
