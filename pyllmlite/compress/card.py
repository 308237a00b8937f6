"""The model card of a directory that was quantized here, and the same as JSON."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from pyllmlite._version import __version__


def provenance(
    base_model: str,
    base_path: str | None,
    settings: dict[str, Any],
    calibration: dict[str, Any] | None,
    bits_per_weight: float,
    layer_loss: dict[int, dict[str, float]],
    measured: dict[str, Any] | None,
) -> dict[str, Any]:
    """What was done, with what, and what it cost; ``quantize.json``.

    Args:
        base_model: The name that it goes by; ``base_path``: from the new directory to it, where it
            is a path.
        calibration: Where its text came from and how much of it; None: the method needs none.
        measured: What the evaluation found; None: it was not run.
    """
    return {
        "made_by": f"pyllmlite {__version__}",
        "base_model": base_model,
        "base_path": base_path,
        "settings": settings,
        "calibration": calibration,
        "bits_per_weight": round(bits_per_weight, 4),
        "measured": measured,
        "layer_loss": {str(i): loss for i, loss in layer_loss.items()},
    }


def model_card(name: str, facts: dict[str, Any]) -> str:
    """README.md in the form that model hubs read."""
    settings, measured = facts["settings"], facts["measured"]
    base = str(facts["base_model"])
    lines = ["---", "library_name: transformers", "tags:", f"- {settings['method']}"]
    if settings.get("layout"):
        lines += ["- quantized", f"- {settings['layout']}"]
    if "/" in base:
        lines.append(f"base_model: {base}")
    lines += ["---", "", f"# {name}", ""]
    lines += [f"`{base}`, quantized with {facts['made_by']}.", "", "## How", ""]
    words = {
        "method": "method", "bits": "bits", "bits_budget": "bits per weight at most",
        "group_size": "group size", "symmetric": "symmetric", "layout": "layout",
        "int8_activations": "int8 inputs", "dtype": "other tensors",
    }  # fmt: skip
    lines += ["| | |", "| --- | --- |"]
    shown = {key: _shown(settings[key]) for key in words if settings.get(key) is not None}
    if shown.get("group_size") == "0":
        shown["group_size"] = "a row"
    lines += [f"| {words[key]} | {value} |" for key, value in shown.items()]
    for key, value in (settings.get("extra") or {}).items():
        lines.append(f"| {key} | {_shown(value)} |")
    lines.append(f"| bits per weight, scales included | {facts['bits_per_weight']:.2f} |")
    lines += ["", "Embeddings, norms and the output matrix are not quantized.", ""]
    lines += ["## Calibration", "", _calibration(facts["calibration"]), ""]
    lines += ["## Loss", ""]
    lines += _measured(measured) if measured else ["It was not measured."]
    lines += ["", *_layers(facts["layer_loss"])]
    return "\n".join(lines).rstrip() + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _calibration(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "None: the method looks at the weights alone."
    text = calibration["text"]
    words = "text that the model wrote itself" if text == "self" else f"`{text}`"
    return (
        f"{calibration['num_sequences']} sequences of {calibration['seq_len']} tokens, {words}, "
        f"seed {calibration['seed']}."
    )


def _measured(measured: dict[str, Any]) -> list[str]:
    lines = [
        f"On {measured['windows']} windows of {measured['length']} tokens of "
        f"`{measured['text']}`, beside the {measured['reference_dtype']} weights; inputs and KV "
        "are floats, so that it is the weights' alone.",
        "",
        "| | this model | reference |",
        "| --- | --- | --- |",
        f"| KL divergence, nats a token | {measured['kl']:.4f} ± {measured['kl_error']:.4f} | 0 |",
        f"| same likeliest token | {measured['top1_agreement']:.1%} | |",
        f"| perplexity | {measured['perplexity']:.3f} | {measured['reference_perplexity']:.3f} |",
    ]
    if measured.get("warning"):
        lines += ["", f"Beware: {measured['warning']}."]
    return lines


def _layers(layer_loss: dict[str, dict[str, float]]) -> list[str]:
    """The matrices that lost most, of all layers."""
    flat = [
        (value, f"layer {index}, {word}")
        for index, loss in layer_loss.items()
        for word, value in loss.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]
    if not flat:
        return []
    counted = Counter({name: value for value, name in flat})
    worst = counted.most_common(5)
    lines = ["What the method measured, the five largest of all layers (`quantize.json`):", ""]
    return lines + [f"- {name}: {value:.3g}" for name, value in worst]
