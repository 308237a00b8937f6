"""What quantizing costs a model: KL divergence to its own float weights, method by method.

    python benchmarks/quantization.py rtn gptq "awq-gptq?group_size=64&rounds=1"
    python benchmarks/quantization.py --dither --sequences 64 rtn?integer_zeros=true awq

Each method is a quantizer with options behind a '?' (``bits``, ``group_size``, ``symmetric``,
``bits_budget``; others go to the strategy).  Calibration text is written by the model itself; the
measure is prose (``pydoc_data.topics``) in windows of 512 tokens that know nothing of each other.
Embedding and head stay as they are.  Everything runs in transformers' float32 modules with the
dequantized weights, so that nothing but the weights' rounding counts.

``--dither``: weights that came out of a 4-bit file lie on its grid, and a method that finds the
grid again looks better than it is.  Every weight gets uniform noise of half a grid step either
way; that model is then the one to keep.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from limits import split_options

from pyllmlite.compress.bits import plan_bits
from pyllmlite.compress.calibration import calibration_tokens
from pyllmlite.compress.layered_model import LayeredModel
from pyllmlite.compress.layerwise import MethodSettings, Quantizers, install, quantize_layers
from pyllmlite.hooks.registry import Registry
from pyllmlite.model.source import ModelSource, open_checkpoint, open_model
from pyllmlite.model.weights import plan_matrices

OWN = ("bits", "group_size", "symmetric")


def dithered(source: ModelSource, directory: Path, seed: int = 0) -> ModelSource:
    """The model with every weight of its layers moved by up to half a step of its stored grid, as a
    float32 directory; made once."""
    if not (directory / "model.safetensors").is_file():
        from safetensors.numpy import save_file

        model = LayeredModel(source)
        full = model.fill()
        rng = np.random.default_rng(seed)
        state = {name: p.numpy().copy() for name, p in full.named_parameters()}
        for name in source.names():
            stored = source.raw(name)
            if not name.startswith("layers.") or stored is None or len(stored.shape) != 2:
                continue
            codes = stored.codes()
            if codes is None or codes.scales is None:
                raise SystemExit(f"{name} is stored as {stored.dtype}, which is no grid to dither")
            columns = stored.shape[1]
            group = np.arange(columns) // (codes.group_size or columns)
            step = np.abs(codes.scales.astype(np.float32))[:, group]
            module, rows = model.module_of(name)
            noise = rng.random(stored.shape, dtype=np.float32) - np.float32(0.5)
            state[module + ".weight"][rows] += noise * step
        directory.mkdir(parents=True, exist_ok=True)
        full.config.save_pretrained(directory)
        save_file(state, str(directory / "model.safetensors"), metadata={"format": "pt"})
        source.tokenizer().backend.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(
            json.dumps(
                {"tokenizer_class": "PreTrainedTokenizerFast", **source.tokenizer().special_tokens}
            )
        )
    return open_checkpoint(directory)


def windows_of(source: ModelSource, count: int, length: int) -> torch.Tensor:
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    ids = source.tokenizer().encode(text, add_special_tokens=False)[: count * length]
    return torch.tensor(ids).reshape(count, length)


@torch.no_grad()
def compare(reference: Any, model: Any, windows: torch.Tensor) -> dict[str, float]:
    """KL divergence D(reference || model) in nats per token with its standard error, agreement of
    the most probable token, and the model's perplexity."""
    kl, same, nll = [], [], []
    for window in windows:
        ours = reference(input_ids=window[None], use_cache=False).logits[0].log_softmax(-1)
        other = model(input_ids=window[None], use_cache=False).logits[0].log_softmax(-1)
        kl.append((ours.exp() * (ours - other)).sum(-1))
        same.append((ours.argmax(-1) == other.argmax(-1)).float())
        nll.append(-other[:-1].gather(1, window[1:, None])[:, 0])
    every = torch.cat(kl)
    return {
        "kl": every.mean().item(),
        "kl_standard_error": every.std().item() / math.sqrt(len(every)),
        "top1_agreement": torch.cat(same).mean().item(),
        "perplexity": torch.cat(nll).mean().exp().item(),
    }


def mean_bits(source: ModelSource, settings: MethodSettings) -> float:
    """Bits per weight of the layers' matrices, scales and zero points included."""
    quantizers = Quantizers(source, settings, Registry.load())
    shapes = [p.shape for p in plan_matrices(source.spec) if p.shape.name.startswith("layers.")]
    sizes = [shape.out_features * shape.in_features for shape in shapes]
    bits = [quantizers.of(shape.name).bits_per_weight(shape) for shape in shapes]
    return sum(s * b for s, b in zip(sizes, bits, strict=True)) / sum(sizes)


def parsed(text: str) -> tuple[MethodSettings, float | None]:
    name, options = split_options(text)
    extra = {**options.pop("extra", {}), **options}
    budget = extra.pop("bits_budget", None)
    own = {key: extra.pop(key) for key in OWN if key in extra}
    return MethodSettings(quantizer=name, extra=extra, **own), budget


def peak_memory() -> float:
    """MB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+", help="name?option=value&...")
    parser.add_argument("--model", help="path, alias or hub id; the default model without")
    parser.add_argument("--dither", type=Path, metavar="DIR", help="measure a dithered model, kept")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=Path, help="calibration tokens, .npy; written if missing")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    source = open_model(args.model)
    if args.dither is not None:
        source = dithered(source, args.dither)
    windows = windows_of(source, args.windows, 512)
    if args.tokens is not None and args.tokens.is_file():
        tokens = np.load(args.tokens)[: args.sequences, : args.length]
    else:
        started = time.perf_counter()
        tokens = calibration_tokens(source, "self", args.sequences, args.length, args.seed)
        print(f"calibration text: {time.perf_counter() - started:.0f} s", flush=True)
        if args.tokens is not None:
            np.save(args.tokens, tokens)
    for text in args.methods:
        settings, budget = parsed(text)
        started, before = time.perf_counter(), peak_memory()
        cpu = time.process_time()  # of all threads
        if budget is not None:
            plan = plan_bits(source, settings, tokens, budget)
            settings = replace(settings, plan=plan.plan)
            if plan.group_size is not None:
                settings = replace(settings, group_size=plan.group_size)
        results = list(quantize_layers(source, settings, tokens))
        seconds, peak = time.perf_counter() - started, peak_memory()
        cpu = time.process_time() - cpu
        model = LayeredModel(source)
        full = model.fill()
        for result in results:
            install(model, full.get_submodule(model.layer_name(result.index)), result)
        reference = LayeredModel(source).fill()
        found = {
            "method": text,
            "bits": mean_bits(source, settings),
            **compare(reference, full, windows),
            "seconds": seconds,
            "cpu_seconds": cpu,
            "peak_mb": peak,
            "before_mb": before,
        }
        del full, model, reference, results
        if args.json:
            print(json.dumps(found), flush=True)
            continue
        print(
            f"{text}: {found['bits']:.3f} bits, KL {found['kl']:.4f} ± "
            f"{found['kl_standard_error']:.4f}, top-1 {found['top1_agreement']:.3f}, perplexity "
            f"{found['perplexity']:.2f}, {seconds:.0f} s (CPU {cpu:.0f}), peak "
            f"{peak:.0f} MB (before {before:.0f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
