"""How an engine is set up: one flat dataclass, checked when it is made."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

from pyllmlite.core.errors import ConfigError
from pyllmlite.core.speculative import from_speculative_config

_DTYPES = {
    "auto": "auto",
    "f32": "f32",
    "float32": "f32",
    "float": "f32",
    "bf16": "bf16",
    "bfloat16": "bf16",
}
_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_STRATEGY_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")

# Words of vLLM's constructor that mean nothing here, with the values under which that is so:
# a script that passes them runs as it stands.  None: any value.
_WITHOUT_MEANING: dict[str, tuple[Any, ...] | None] = {
    "trust_remote_code": None,
    "gpu_memory_utilization": None,
    "enforce_eager": None,
    "disable_log_stats": None,
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "enable_chunked_prefill": (True, None),
    "load_format": ("auto", "safetensors", "gguf"),
    "tokenizer_mode": ("auto",),
    "disable_custom_all_reduce": None,
    "max_seq_len_to_capture": None,
    "distributed_executor_backend": None,
    "compilation_config": None,
    "limit_mm_per_prompt": None,
    "cpu_offload_gb": (0,),
    "enable_lora": (False,),
    "hf_overrides": (None, {}),
    "task": ("generate", "auto"),
    "runner": ("generate", "auto"),
    "generation_config": ("vllm",),
}


def parse_bytes(value: float | str) -> int:
    """``512MB`` (10^6), ``2GiB`` (2^30), ``1.5g`` or a number of bytes."""
    if isinstance(value, bool):
        raise ConfigError(f"a memory size is a number of bytes or '512MB', got {value!r}")
    if isinstance(value, (int, float)):
        size = float(value)
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(value))
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(f"a memory size is a number of bytes or '512MB', got {value!r}")
        size = float(match[1]) * _UNITS[match[2].lower()]
    if not 0 < size < 2**62:
        raise ConfigError(f"a memory size must be positive, got {value!r}")
    return int(size)


def _swap_bytes(value: float | str | None) -> int:
    """vLLM's word: a number counts GiB."""
    if isinstance(value, bool):
        raise ConfigError(f"swap_space is a number of GiB or '512MB', got {value!r}")
    try:
        number = float(value or 0)
    except (TypeError, ValueError):
        return parse_bytes(value)  # type: ignore[arg-type]
    return parse_bytes(number * 2**30) if number else 0


@dataclass
class EngineConfig:
    """Words are vLLM's wherever it has them.

    Attributes:
        model: Path of a checkpoint, alias, or hub id; None: the default model.
        tokenizer: Where the tokenizer is if not with the model.
        skip_tokenizer_init: Token ids in, token ids out.
        dtype: ``auto``, ``f32`` or ``bf16`` (also ``float32``, ``bfloat16``).  ``auto``: what
            the checkpoint has; bf16 for 16-bit floats, and for weights that are quantized.
        max_model_len: Prompt and output of a sequence at most; None: the model's own.
        max_num_seqs: Sequences that run at once.
        max_num_batched_tokens: Tokens of one step; None: chosen by the builder.
        enable_prefix_caching: Prompts that begin alike share keys and values.
        seed: Requests without a seed of their own draw theirs from this one.
        attention, cache, quantizer, scheduler, decoder: Strategies by name; ``auto``: the
            highest priority that supports what is asked.
        proposer: Name of what proposes draft tokens; None: nothing does.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: Threads of the CPU pool; None: the CPUs this process may use.
        kv_cache_memory: Bytes, or ``"512MB"``; None: chosen by the builder.
        kv_cache_dtype: ``auto`` (the model's) or a word that a cache knows: ``f32``, ``bf16``,
            ``int8``, or a plugin's.
        block_size: Tokens of a KV block; None: the cache's choice.
        sliding_window: Every layer sees so many tokens back at most, itself included; None: as the
            model has it.
        attention_sinks: First tokens that stay besides such a window (StreamingLLM): with a few,
            4 say, a model goes on beyond the length it was trained for, in memory that does not
            grow.
        swap_space: Memory in which the blocks of preempted sequences wait, as ``"512MB"`` or a
            number of GiB; 0: preempted sequences are computed again.
        preemption_mode: With a swap space: ``swap``, ``recompute``, or ``auto``, whichever is
            cheaper for a sequence.
        bits, group_size, symmetric: For the quantizer; None: its own defaults.
        max_logprobs: Most log-probabilities a request may ask for.
        revision: Of a model on the hub.
        extra: Options of strategies, by their names; handed on as they are.
    """

    model: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    seed: int = 0
    attention: str = "auto"
    cache: str = "auto"
    quantizer: str = "auto"
    scheduler: str = "auto"
    decoder: str = "sample"
    proposer: str | None = None
    device: str = "auto"
    threads: int | None = None
    kv_cache_memory: int | str | None = None
    kv_cache_dtype: str = "auto"
    block_size: int | None = None
    sliding_window: int | None = None
    attention_sinks: int = 0
    swap_space: float | str = 0
    preemption_mode: str = "auto"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    max_logprobs: int = 20
    revision: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, (str, os.PathLike)) or not str(value):
                    raise ConfigError(f"{name} must be a path, an alias or a hub id, got {value!r}")
                setattr(self, name, os.fspath(value))
        dtype = str(self.dtype).removeprefix("torch.").lower()
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype must be auto, f32 or bf16, got {self.dtype!r}")
        self.dtype = _DTYPES[dtype]
        for name, low, optional in (
            ("max_model_len", 1, True),
            ("max_num_seqs", 1, False),
            ("max_num_batched_tokens", 1, True),
            ("threads", 1, True),
            ("block_size", 1, True),
            ("sliding_window", 1, True),
            ("attention_sinks", 0, False),
            ("bits", 1, True),
            ("group_size", 1, True),
            ("max_logprobs", 0, False),
        ):
            value = getattr(self, name)
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")
            # What the native library counts with, and its largest pool.
            high = 1024 if name == "threads" else 2**31 - 1
            if value > high:
                raise ConfigError(f"{name} must be at most {high}, got {value}")
        if self.seed is None:
            self.seed = 0
        if self.extra is None:
            self.extra = {}
        if not isinstance(self.extra, dict) or not all(isinstance(n, str) for n in self.extra):
            raise ConfigError(f"extra is a dict from names to values, got {self.extra!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed must be an integer, got {self.seed!r}")
        for name in ("attention", "cache", "quantizer", "scheduler", "decoder"):
            self._check_name(name, getattr(self, name))
        if self.proposer is not None:
            self._check_name("proposer", self.proposer)
        if not isinstance(self.kv_cache_dtype, str) or not self.kv_cache_dtype:
            raise ConfigError(f"kv_cache_dtype must be a word, got {self.kv_cache_dtype!r}")
        if self.attention_sinks and self.sliding_window is None:
            raise ConfigError("attention_sinks stay besides a window: give sliding_window too")
        _swap_bytes(self.swap_space)
        if self.preemption_mode not in ("auto", "swap", "recompute"):
            raise ConfigError(
                f"preemption_mode must be auto, swap or recompute, got {self.preemption_mode!r}"
            )
        if self.preemption_mode == "swap" and not self.swap_bytes:
            raise ConfigError("preemption_mode='swap' needs a swap_space")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.kv_cache_memory is not None:
            self.kv_cache_memory = parse_bytes(self.kv_cache_memory)

    @staticmethod
    def _check_name(contract: str, value: object) -> None:
        if not isinstance(value, str) or not _STRATEGY_NAME.fullmatch(value):
            raise ConfigError(
                f"{contract} must be a strategy's name (lower case, digits, '-'), got {value!r}"
            )

    @property
    def swap_bytes(self) -> int:
        """``swap_space`` as a number."""
        return _swap_bytes(self.swap_space)

    @property
    def kv_cache_bytes(self) -> int | None:
        """``kv_cache_memory`` as a number."""
        return None if self.kv_cache_memory is None else int(self.kv_cache_memory)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """From the words of ``LLM(...)``, vLLM's ``quantization`` and ``speculative_config`` among
        them: an unknown one is refused with the nearest known one."""
        if "quantization" in kwargs:
            kwargs["quantizer"] = kwargs.pop("quantization") or "auto"
        speculative = kwargs.pop("speculative_config", None)
        if speculative is not None:
            if kwargs.get("proposer") is not None:
                raise ConfigError("proposer and speculative_config say the same; leave one out")
            kwargs["proposer"], extra = from_speculative_config(speculative)
            kwargs["extra"] = {**extra, **(kwargs.get("extra") or {})}
        known = {f.name for f in fields(cls)}
        for name in [n for n in kwargs if n not in known]:
            if name not in _WITHOUT_MEANING:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"unknown option {name!r}{hint}")
            allowed = _WITHOUT_MEANING[name]
            if allowed is not None and kwargs[name] not in allowed:
                raise ConfigError(
                    f"{name}={kwargs[name]!r} is not supported; leave it out or use {allowed[0]!r}"
                )
            del kwargs[name]
        return cls(**kwargs)
