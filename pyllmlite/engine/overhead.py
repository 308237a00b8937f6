"""What the engine itself costs: steps of a model that is too small to cost anything.

``pyllmlite bench overhead`` runs it: 2 layers, hidden size 64, a vocabulary of 1,024, random
weights.  A step is timed from schedule to commit, everything included.
"""

from __future__ import annotations

import json
import statistics
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import StepError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.engine import Engine

BATCHES = (1, 16, 64)
PROMPT_TOKENS = 16
WARM_UP = 20
MARGIN = 16  # those whose prompt runs first decode while the others are in prefill

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
}


def write_tiny_model(directory: Path, seed: int = 0) -> None:
    """A Llama checkpoint with random weights: ``config.json`` and ``model.safetensors``."""
    hidden, inner, vocab = 64, 128, 1024
    shapes = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(2):
        at = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (hidden, hidden)
        shapes[f"{at}mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{at}input_layernorm.weight"] = (hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (hidden,)
    draw = np.random.default_rng(seed)
    header: dict[str, Any] = {}
    parts: list[bytes] = []
    position = 0
    for name, shape in shapes.items():
        scale = 0.0 if len(shape) == 1 else 0.1
        values = (draw.standard_normal(shape) * scale + (len(shape) == 1)).astype("<f4")
        parts.append(values.tobytes())
        end = position + len(parts[-1])
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (directory / "config.json").write_text(json.dumps(_CONFIG))
    (directory / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + b"".join(parts)
    )


class _TimedProgram:
    """Notes how long each run takes."""

    def __init__(self, program: Any) -> None:
        self._run = program.run
        self.seconds: list[float] = []

    def run(self, batch: Any) -> None:
        start = time.perf_counter()
        self._run(batch)
        self.seconds.append(time.perf_counter() - start)


def measure_steps(
    built: Any, batch: int, steps: int, rounds: int = 1, stream: bool = False
) -> dict[str, Any]:
    """Decode steps of ``batch`` requests: medians in microseconds.

    Args:
        steps: Timed in a round, over as many tokens of context.
        stream: Every request wants its output after each step.
    Returns:
        ``step_us``: everything; ``native_us``: the part in ``Program.run``; ``engine_us``: the
        rest; ``step_us_p10``: a tenth of the steps took less, which is what an otherwise idle
        machine would show.
    """
    whole: list[float] = []
    native: list[float] = []
    for _ in range(rounds):
        _time_round(built, batch, steps, stream, whole, native)
    rest = [a - b for a, b in zip(whole, native, strict=True)]
    return {
        "batch": batch,
        "step_us": round(1e6 * statistics.median(whole), 1),
        "native_us": round(1e6 * statistics.median(native), 1),
        "engine_us": round(1e6 * statistics.median(rest), 1),
        "step_us_p10": round(1e6 * sorted(whole)[len(whole) // 10], 1),
        "steps": len(whole),
    }


def _time_round(
    built: Any, batch: int, steps: int, stream: bool, whole: list[float], native: list[float]
) -> None:
    engine = Engine(built)
    engine.program = timed = _TimedProgram(built.program)
    draw = np.random.default_rng(batch)
    params = SamplingParams(
        temperature=0.0, max_tokens=steps + WARM_UP + MARGIN, ignore_eos=True, detokenize=False
    )
    for i in range(batch):
        prompt = draw.integers(built.spec.vocab_size, size=PROMPT_TOKENS).tolist()
        engine.add(str(i), prompt, params, stream=stream)
    while any(seq.num_uncomputed != 1 for seq in engine.pool.running + engine.pool.waiting):
        engine.step()
    for _ in range(WARM_UP):
        engine.step()
    timed.seconds.clear()
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - start)
    native += timed.seconds
    running = len(engine.pool.running)
    for i in range(batch):
        engine.abort(str(i))
    built.cache.reset_prefix_cache()
    if running != batch or len(native) != len(whole):
        raise StepError(f"{running} of {batch} sequences decoded; the figures would mean nothing")


def measure_overhead(
    batches: tuple[int, ...] = BATCHES,
    steps: int = 128,
    rounds: int = 5,
    threads: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Build the tiny model and time it at each batch size.

    Args:
        options: Further fields of :class:`~pyllmlite.core.config.EngineConfig`: other
            strategies, to see what they cost.
    """
    from pyllmlite.model.build import build
    from pyllmlite.runtime.native import native

    length = PROMPT_TOKENS + WARM_UP + steps + MARGIN
    with tempfile.TemporaryDirectory(prefix="pyllmlite-overhead-") as directory:
        write_tiny_model(Path(directory))
        settings = {
            "dtype": "f32",
            "max_model_len": length,
            "max_num_seqs": max(batches),
            "skip_tokenizer_init": True,
            "threads": threads,
            **options,
        }
        built = build(directory, EngineConfig.from_kwargs(model=directory, **settings))
        results = [measure_steps(built, batch, steps, rounds) for batch in batches]
    return {
        "model": {"layers": 2, "hidden_size": 64, "vocab_size": 1024, "dtype": built.dtype},
        "threads": threads,
        "isa": native().info()["isa"],
        "context": [PROMPT_TOKENS + WARM_UP, PROMPT_TOKENS + WARM_UP + steps],
        "results": results,
    }
