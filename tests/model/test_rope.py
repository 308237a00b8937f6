"""Rotary tables against transformers' own, for every scaling."""

from __future__ import annotations

import numpy as np
import pytest

from pyllmlite.core.errors import ModelError
from pyllmlite.core.spec import RopeSpec
from pyllmlite.model.architectures.base import Config, rope_spec
from pyllmlite.model.rope import inverse_frequencies, rope_tables

torch = pytest.importorskip("torch")

CASES = {
    "default": {},
    "theta": {"rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
    "yarn-options": {
        "rope_type": "yarn", "factor": 3.5, "original_max_position_embeddings": 200,
        "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.9,
        "truncate": False, "rope_theta": 50000.0,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128,
        "attention_factor": 1.25,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256, "rope_theta": 500000.0,
    },
    "longrope": {
        "rope_type": "longrope", "original_max_position_embeddings": 600,
        "short_factor": [1.0 + 0.1 * i for i in range(16)],
        "long_factor": [1.0 + 1.5 * i for i in range(16)],
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip
LENGTH = 512


def _config(parameters: dict, maximum: int = 1024):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=maximum,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **parameters},
    )  # fmt: skip


def _theirs(config, positions: range) -> tuple[np.ndarray, np.ndarray]:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([list(positions)]))
    half = cos.shape[-1] // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


@pytest.mark.parametrize("name", CASES)
def test_tables_equal_transformers(name):
    config = _config(CASES[name])
    rope = rope_spec(Config(config.to_dict()), 32)
    cos, sin = rope_tables(rope, LENGTH)
    assert cos.dtype == sin.dtype == np.float32 and cos.shape == sin.shape == (LENGTH, 16)
    their_cos, their_sin = _theirs(config, range(LENGTH))
    np.testing.assert_allclose(cos, their_cos, rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin, their_sin, rtol=0, atol=1e-6)


def test_far_positions_follow_the_rounded_frequencies():
    config = _config({"rope_theta": 500000.0}, maximum=1 << 17)
    cos, _ = rope_tables(rope_spec(Config(config.to_dict()), 32), 100_001)
    their_cos, _ = _theirs(config, range(99_990, 100_001))
    # One unit in the last place of a frequency is 6e-3 radians out here.
    assert np.mean(np.abs(cos[99_990:] - their_cos) < 1e-5) > 0.9
    np.testing.assert_allclose(cos[99_990:], their_cos, rtol=0, atol=2e-2)


def test_dynamic_is_what_a_decode_step_has():
    config = _config(CASES["dynamic"], maximum=64)
    rope = rope_spec(Config(config.to_dict()), 32)
    assert rope.original_max_position == 64
    cos, sin = rope_tables(rope, 200)
    for position in (0, 5, 63, 64, 65, 100, 199):
        their_cos, their_sin = _theirs(config, range(position + 1))
        np.testing.assert_allclose(cos[position], their_cos[-1], rtol=0, atol=2e-5)
        np.testing.assert_allclose(sin[position], their_sin[-1], rtol=0, atol=2e-5)
    first, _ = inverse_frequencies(rope, 64)
    last, _ = inverse_frequencies(rope, 200)
    assert np.all(last <= first) and last[-1] < first[-1]


def test_longrope_takes_the_long_factors_past_the_original_length():
    config = _config(CASES["longrope"])
    rope = rope_spec(Config(config.to_dict()), 32)
    for length in (600, 601):
        cos, sin = rope_tables(rope, length)
        their_cos, their_sin = _theirs(config, range(length))
        np.testing.assert_allclose(cos, their_cos, rtol=0, atol=1e-6)
        np.testing.assert_allclose(sin, their_sin, rtol=0, atol=1e-6)
    assert not np.allclose(rope_tables(rope, 600)[0], rope_tables(rope, 601)[0][:600])


def test_older_words_of_configs():
    old = {"max_position_embeddings": 4096, "rope_theta": 5e5,
           "rope_scaling": {"type": "linear", "factor": 2.0}}  # fmt: skip
    assert rope_spec(Config(old), 64) == RopeSpec(
        5e5, 64, {"rope_type": "linear", "factor": 2.0}, 4096
    )
    assert rope_spec(Config({"partial_rotary_factor": 0.5}), 64).rotary_dim == 32
    assert rope_spec(Config({"rope_scaling": None}), 64).scaling is None
    phi = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256,
           "rope_scaling": {"type": "su", "long_factor": [1.0], "short_factor": [1.0]}}  # fmt: skip
    rope = rope_spec(Config(phi), 2)
    assert rope.scaling["rope_type"] == "longrope" and rope.scaling["factor"] == 4.0
    assert rope.original_max_position == 256


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "mrope"}, "rope_type 'mrope' is not known"),
        ({"rope_type": "linear", "factor": 0}, "factor must be positive"),
        ({"rope_type": "linear", "factor": "x"}, "needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "factor": 1.0}, "short_factor must be"),
        ({"rope_type": "longrope", "short_factor": None, "factor": 1.0}, "short_factor must be"),
    ],
)
def test_bad_scalings(parameters, message):
    with pytest.raises(ModelError, match=message):
        rope_tables(RopeSpec(10000.0, 32, parameters, 4096), 8)


def test_odd_rotary_dimension_is_refused():
    with pytest.raises(ModelError, match="must be even"):
        rope_spec(Config({"partial_rotary_factor": 0.3}), 10)


def test_no_positions_and_one():
    cos, sin = rope_tables(RopeSpec(10000.0, 8), 0)
    assert cos.shape == sin.shape == (0, 4)
    cos, sin = rope_tables(RopeSpec(10000.0, 8), 1)
    assert np.all(cos == 1) and np.all(sin == 0)


def test_scaling_without_finite_angles_is_refused():
    rope = RopeSpec(10000.0, 16, {"rope_type": "linear", "factor": 1e-300}, 64)
    with pytest.raises(ModelError, match="no finite angles"):
        rope_tables(rope, 64)
