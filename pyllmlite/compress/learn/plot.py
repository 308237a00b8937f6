"""The loss of a run, as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from pyllmlite.compress.learn.history import History

NAME = "loss.png"
_SMOOTH = 0.95  # of the running mean
_DRAWN = ("kl", "loss", "cross_entropy")  # what of the evaluated has the loss's unit


def draw_loss(history: History, path: str | Path | None = None) -> Path | None:
    """Draw loss, its running mean and what was evaluated over the steps.

    Args:
        path: None: ``loss.png`` in the run's directory.
    Returns:
        The file; None: matplotlib is not installed, or nothing was logged.
    """
    logged = history.values("loss")
    if not logged or importlib.util.find_spec("matplotlib") is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    target = history.out / NAME if path is None else Path(path)
    figure: Any
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    steps, losses = zip(*logged, strict=True)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    axes.plot(steps, _running_mean(losses), color="tab:blue", label="training loss")
    names = dict.fromkeys(k for r in history.records for k in r if k.startswith("eval_"))
    for name in [n for n in names if n.endswith(_DRAWN)]:
        at, values = zip(*history.values(name), strict=True)
        axes.plot(at, values, marker="o", markersize=3, label=name.removeprefix("eval_"))
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per token")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    try:
        figure.savefig(target, dpi=120)
    except OSError:  # a picture is a comfort: the run's result does not hang on it
        return None
    finally:
        pyplot.close(figure)
    return target


def _running_mean(values: Any) -> list[float]:
    """Exponential, corrected for its start as Adam's moments are."""
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = _SMOOTH * mean + (1 - _SMOOTH) * value
        weight = _SMOOTH * weight + (1 - _SMOOTH)
        result.append(mean / weight)
    return result
