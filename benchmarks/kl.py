"""What int8 activations cost a model: KL divergence to the same weights with float activations.

    python benchmarks/kl.py model.gguf [--tokens 16384] [--window 512] [--json]
    python benchmarks/kl.py "folder?quantizer=rtn&bits=4&group_size=64"

Prose (``pydoc_data.topics``, or ``--text FILE``) is read in windows that know nothing of each
other.  Every token's distribution over the vocabulary is compared with that of the reference: the
same packed weights, activations in f32, KV in f32.  Two programs are compared with it: int8
activations with KV in f32, which is what the activations alone cost, and int8 activations with the
KV that the engine chooses, as it runs by default.  Prints the mean KL divergence D(reference ||
program) in nats per token with its standard error, how often the most probable token is the same,
and perplexities.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from limits import split_options
from rich.console import Console
from rich.progress import track

from pyllmlite.core.config import EngineConfig
from pyllmlite.model.build import Built, build
from pyllmlite.model.source import ModelSource, open_model

CHUNK = 64  # tokens whose logits are in memory at once


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64, over the last axis."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


@dataclass
class Comparison:
    """Per token: KL divergence to the reference, whether the most probable token is the same, and
    the negative log-probability of the next token (NaN for a window's last)."""

    name: str
    kl: list[float] = field(default_factory=list)
    agree: list[bool] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)

    def add(self, reference: np.ndarray, other: np.ndarray, following: np.ndarray) -> None:
        """Log-probabilities ``[tokens, vocab]`` of both; ``following``: next token or -1."""
        self.kl += (np.exp(reference) * (reference - other)).sum(axis=-1).tolist()
        self.agree += (reference.argmax(axis=-1) == other.argmax(axis=-1)).tolist()
        scores = -other[np.arange(len(other)), following]
        self.nll += np.where(following >= 0, scores, np.nan).tolist()

    def result(self) -> dict[str, Any]:
        kl = np.array(self.kl)
        return {
            "program": self.name,
            "tokens": len(kl),
            "kl": float(kl.mean()),
            "kl_standard_error": float(kl.std() / math.sqrt(len(kl))),
            "kl_largest": float(kl.max()),
            "top1_agreement": float(np.mean(self.agree)),
            "perplexity": float(np.exp(np.nanmean(self.nll))),
        }


def read_chunk(built: Built, seq_id: int, tokens: list[int], start: int) -> np.ndarray:
    """Logits ``[count, vocab]`` of the next tokens of a window whose first ``start`` were read."""
    count = min(CHUNK, len(tokens) - start)
    batch = built.batch
    if not built.cache.reserve(seq_id, start + count):
        raise SystemExit("the KV cache holds no window: use a smaller --window")
    batch.set_step([0], [start], [count], [count])
    for row in range(count):
        batch.want_logits(row)
    built.program.run(batch)
    logits = np.stack([batch.logits(row) for row in range(count)])
    built.cache.commit(seq_id, tokens, start + count)
    return logits


def compare_window(programs: list[Built], results: list[Comparison], tokens: list[int]) -> None:
    seq_id = 1
    for built in programs:
        built.cache.acquire(seq_id, 0, tokens)
        built.batch.token_table[0, : len(tokens)] = tokens
        built.batch.set_sampling(0, temperature=0.0)
    following = np.array([*tokens[1:], -1])
    for start in range(0, len(tokens), CHUNK):
        reference = log_softmax(read_chunk(programs[0], seq_id, tokens, start))
        results[0].add(reference, reference, following[start : start + CHUNK])
        for built, result in zip(programs[1:], results[1:], strict=True):
            other = log_softmax(read_chunk(built, seq_id, tokens, start))
            result.add(reference, other, following[start : start + CHUNK])
    for built in programs:
        built.cache.free(seq_id)


def load(source: ModelSource, options: dict[str, Any], window: int, **more: Any) -> Built:
    extra = {**options.pop("extra", {}), **more.pop("extra", {})}
    settings = {
        "skip_tokenizer_init": True,
        "max_num_seqs": 1,
        "max_model_len": window,
        "max_num_batched_tokens": CHUNK,
        "enable_prefix_caching": False,
        **options,
        **more,
    }
    return build(source, EngineConfig.from_kwargs(extra=extra, **settings))


def text_of(path: Path | None) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="path, alias or hub id, with options behind a '?'")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--text", type=Path, help="a file of UTF-8 text")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    path, options = split_options(args.model)
    source = open_model(path)
    tokens = source.tokenizer().encode(text_of(args.text), add_special_tokens=False)
    tokens = tokens[: args.tokens]
    if len(tokens) < 2 or args.window < 2:
        raise SystemExit("a window needs at least 2 tokens of text")
    variants: dict[str, dict[str, Any]] = {
        "f32 activations, f32 KV": {
            "extra": {"int8_activations": False, "bf16_activations": False},
            "kv_cache_dtype": "f32",
        },
        "bf16 activations, f32 KV": {
            "extra": {"int8_activations": False},
            "kv_cache_dtype": "f32",
        },
        "int8 activations, f32 KV": {"kv_cache_dtype": "f32"},
        "int8 activations, default KV": {},
    }
    programs = [
        load(source, dict(options), args.window, threads=args.threads, **more)
        for more in variants.values()
    ]
    results = [Comparison(name) for name in variants]
    console = Console(stderr=True)
    starts = range(0, len(tokens) - 1, args.window)
    for start in track(starts, description="windows", console=console, transient=True):
        compare_window(programs, results, tokens[start : start + args.window])
    rows = [result.result() for result in results]
    if args.json:
        print(json.dumps({"model": args.model, "window": args.window, "results": rows}, indent=1))
        return
    print(f"{rows[0]['tokens']} tokens in windows of {args.window}, {programs[1].dtype} model")
    print(f"{rows[0]['program']}: perplexity {rows[0]['perplexity']:.3f}")
    for row in rows[1:]:
        print(
            f"{row['program']}: KL {row['kl']:.5f} ± {row['kl_standard_error']:.5f} nats per token "
            f"(largest {row['kl_largest']:.3f}), top-1 agreement {row['top1_agreement']:.2%}, "
            f"perplexity {row['perplexity']:.3f}"
        )


if __name__ == "__main__":
    main()
