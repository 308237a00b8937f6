"""vLLM's words for speculation."""

import pytest

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "proposer", "extra"),
    [
        ({"method": "ngram"}, "prompt-lookup", {}),
        (
            {"model": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4},
            "prompt-lookup",
            {"num_speculative_tokens": 5, "prompt_lookup_max": 4},
        ),
        ({"model": "small"}, "draft-model", {"draft_model": "small"}),
        (
            {"method": "draft_model", "model": "small", "quantization": "rtn", "revision": None},
            "draft-model",
            {"draft_model": "small", "draft_options": {"quantizer": "rtn"}},
        ),
    ],
)
def test_words(config, proposer, extra):
    made = EngineConfig.from_kwargs(speculative_config=config, extra={"other": 1})
    assert made.proposer == proposer
    assert made.extra == extra | {"other": 1}


def test_none_is_none():
    made = EngineConfig.from_kwargs(speculative_config=None)
    assert made.proposer is None and made.extra == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "eagle", "model": "x"}, "no method 'eagle'; there are ngram, draft_model"),
        ({"method": "ngram", "model": "x"}, "method 'ngram' does not know model"),
        ({"model": "x", "width": 3}, "method 'draft_model' does not know width"),
        ("ngram", "must be a dict"),
    ],
)
def test_what_is_not_known(config, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_kwargs(speculative_config=config)
    with pytest.raises(ConfigError, match="say the same"):
        EngineConfig.from_kwargs(speculative_config={"method": "ngram"}, proposer="x")
