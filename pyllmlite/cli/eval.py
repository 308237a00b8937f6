"""``pyllmlite eval``: what quantizing cost, as a table, as JSON and as a plot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllmlite.cli.output import print_json, print_table, size

if TYPE_CHECKING:
    from pyllmlite.compress.evaluate import Choice, Report


def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Alias, hub id or path, with options behind a '?': 'path?quantizer=rtn&bits=4'.",
            show_default="smollm2-135m",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What they are compared with.",
            show_default="the float32 weights of what the first was made from",
        ),
    ] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(
            help="Quantizers by name, joined by commas, each with options behind a '?': "
            "'rtn?group_size=32,nf4,int8'. Every model is measured with each.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A file of UTF-8 text.", show_default="Python's own help")
    ] = None,
    windows: Annotated[
        int, typer.Option("--windows", "-N", min=1, help="Windows of text.")
    ] = 16,
    length: Annotated[int, typer.Option("--length", "-L", min=2, help="Tokens of each.")] = 512,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only", help="Inputs and KV stay floats: what the weights alone cost."
        ),
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time prefill and decode, too.")
    ] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    plot: Annotated[
        str | None,
        typer.Option(help="Draw loss over bits into this file (.png, .svg, .pdf)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure loss, size and speed of models beside a reference.

    Loss is the mean KL divergence to the reference in nats per token, how often the likeliest
    token is the same, and perplexity.
    """
    from pyllmlite.cli.plot_file import check_plot
    from pyllmlite.compress import evaluate as logic
    from pyllmlite.compress.plot import draw
    from pyllmlite.compress.texts import read_text

    if plot is not None:
        check_plot(plot)
    prose = read_text(text)
    chosen = combined([logic.Choice.parse(m) for m in models or [""]], quantizer)
    with _progress() as tell:
        report = logic.evaluate(
            chosen,
            prose,
            None if reference is None else logic.Choice.parse(reference),
            windows,
            length,
            weights_only,
            speed,
            threads,
            tell,
        )
    if plot is not None:
        draw(report, plot)
    if json:
        print_json(as_json(report))
    else:
        _print(report, speed)
    for row in report.rows:
        if row.warning:
            print(f"pyllmlite: warning: {row.label}: {row.warning}", file=sys.stderr)


def combined(models: list[Choice], quantizers: str | None) -> list[Choice]:
    """Every model with every quantizer of a list ``rtn?bits=8,nf4``."""
    from pyllmlite.compress.evaluate import Choice, parse_options
    from pyllmlite.core.errors import ConfigError

    if quantizers is None:
        return models
    made = []
    for word in quantizers.split(","):
        name, _, query = word.strip().partition("?")
        if not name:
            raise ConfigError(f"--quantizer is a list of names and commas, got {quantizers!r}")
        made.append({"quantizer": name, **parse_options(query)})
    return [Choice(m.model, {**m.options, **options}) for m in models for options in made]


def as_json(report: Report) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


def _print(report: Report, speed: bool) -> None:
    head = ["model", "bits", "size", "KL", "±", "top-1 %", "perplexity"]
    head += ["prefill tok/s", "decode tok/s"] if speed else []
    rows: list[list[Any]] = []
    for row in report.rows:
        cells: list[Any] = [
            row.label + (" (!)" if row.warning else ""),
            round(row.bits_per_weight, 2),
            size(row.weight_bytes),
            float(f"{row.kl:.3g}"),
            float(f"{row.kl_error:.2g}"),
            round(100 * row.top1_agreement, 1),
            round(row.perplexity, 3),
        ]
        if speed:
            speeds = (row.prefill_tokens_per_second, row.decode_tokens_per_second)
            cells += [round(tokens or 0) for tokens in speeds]
        rows.append(cells)
    print_table(head, rows)
    base = report.reference
    inputs = "inputs and KV as floats" if report.weights_only else "models as they run by default"
    print(
        f"\nbeside {base.label} in {report.reference_dtype}, perplexity {base.perplexity:.3f}; "
        f"{report.windows} windows of {report.length} tokens of {report.text}; {inputs}"
    )


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal, nothing elsewhere."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=1)
        yield lambda what, done, total: shown.update(
            task, description=what, completed=done, total=max(total, 1)
        )
