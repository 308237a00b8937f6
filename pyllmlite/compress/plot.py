"""Loss over bits, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllmlite.core.errors import ConfigError

if TYPE_CHECKING:
    from pyllmlite.compress.evaluate import Report

LEAST_KL = 1e-6  # what a logarithmic axis begins with


def draw(report: Report, path: str | Path) -> None:
    """Mean KL divergence (logarithmic) over bits per weight, a point a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure: Any
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for row in report.rows:
        loss = max(row.kl, LEAST_KL)
        axes.errorbar(row.bits_per_weight, loss, yerr=row.kl_error, fmt="o", capsize=2)
        axes.annotate(
            row.label + (" (!)" if row.warning else ""),
            (row.bits_per_weight, loss),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize="small",
        )
    axes.set_yscale("log")
    axes.margins(x=0.2, y=0.2)
    axes.set_xlabel("bits per weight of the layers, scales included")
    axes.set_ylabel("KL divergence, nats per token")
    axes.set_title(f"Loss beside {report.reference.label} on {report.text}", fontsize="medium")
    axes.grid(True, which="both", alpha=0.25)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        pyplot.close(figure)
