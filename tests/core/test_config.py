"""Options that cannot work are refused in one line."""

import pytest

from pyllmlite.core.config import EngineConfig, parse_bytes
from pyllmlite.core.errors import ConfigError, PyllmliteError


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MB", 512_000_000), ("2GiB", 2 << 30), ("1.5g", 1_500_000_000), (4096, 4096),
     (" 10 kb ", 10_000), ("7", 7)],
)  # fmt: skip
def test_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1XB", 0, -5, True, "1e9999GB", "nan"])
def test_bad_bytes(text):
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "f17"}, "dtype must be auto, f32 or bf16"),
        ({"device": "tpu"}, "device must be"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1"),
        ({"max_model_len": 2.5}, "max_model_len"),
        ({"threads": True}, "threads"),
        ({"threads": 1025}, "threads must be at most 1024"),
        ({"max_num_batched_tokens": 2**31}, "max_num_batched_tokens must be at most 2147483647"),
        ({"seed": "a"}, "seed"),
        ({"scheduler": "Fair!"}, "scheduler must be a strategy's name"),
        ({"kv_cache_memory": "lots"}, "'512MB'"),
        ({"schedular": "fair"}, "did you mean 'scheduler'"),
        ({"zzz": 1}, "unknown option 'zzz'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported"),
        ({"model": 3}, "model must be"),
    ],
)
def test_refused(options, words):
    with pytest.raises(PyllmliteError, match=words) as error:
        EngineConfig.from_kwargs(**options)
    assert "\n" not in str(error.value)


def test_words_of_vllm_pass():
    config = EngineConfig.from_kwargs(
        model="m", dtype="bfloat16", trust_remote_code=True, gpu_memory_utilization=0.9,
        enforce_eager=True, tensor_parallel_size=1, quantization="rtn", kv_cache_memory="1GB",
    )  # fmt: skip
    assert (config.dtype, config.quantizer, config.kv_cache_bytes) == ("bf16", "rtn", 10**9)


def test_paths_and_torch_dtypes(tmp_path):
    class Dtype:
        def __str__(self):
            return "torch.float32"

    config = EngineConfig(model=tmp_path, dtype=Dtype())
    assert config.model == str(tmp_path) and config.dtype == "f32"
