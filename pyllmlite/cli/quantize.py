"""``pyllmlite quantize``: a model directory becomes a lighter one."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllmlite.cli.options import parse_extra
from pyllmlite.cli.output import print_json, size

if TYPE_CHECKING:
    from collections.abc import Iterator


def quantize(
    model: Annotated[
        str | None, typer.Argument(help="Alias, hub id or path.", show_default="smollm2-135m")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", "-m", help="rtn, gptq, awq, ... (pyllmlite plugins); bf16, f16, f32 cast."
        ),
    ] = "rtn",
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Directory that is made.", show_default=False),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits of a weight: 4 or 8.", show_default="the method's")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            min=0, help="Columns that share a scale; 0: the row.", show_default="the method's"
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Without zero points, or with.",
            show_default="the method's",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help='Bits of single matrices: a JSON file such as {"layers.0.mlp_down": 8}.',
            show_default=False,
        ),
    ] = None,
    bits_budget: Annotated[
        float | None,
        typer.Option(
            help="Bits per weight at most, given to the layers where they buy the most.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors (pack-quantized), int-quantized, gptq or gptq_v2.",
            show_default="compressed-tensors",
        ),
    ] = None,
    int8_activations: Annotated[
        bool,
        typer.Option("--int8-activations", help="Inputs are int8 too, a scale per token (W8A8)."),
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of all other tensors: f32, bf16, f16.", show_default="the model's; bf16 of a GGUF"
        ),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="Text to calibrate on: self (the model writes it), a .txt or .jsonl file, or the "
            "name of a data set."
        ),
    ] = "self",
    num_sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences of calibration.", show_default="the method's"),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of each.", show_default="the method's")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the calibration.")] = 0,
    extra: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the method's own option; may be repeated."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace --out, when the new one is complete.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted run left.")
    ] = False,
    eval_windows: Annotated[
        int, typer.Option(min=0, help="Windows of text the loss is measured on; 0: it is not.")
    ] = 8,
    eval_length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    eval_text: Annotated[
        str | None, typer.Option(help="A file of text.", show_default="Python's own help")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a model directory lighter.

    Interrupted, the same command goes on at the layer it was in.  The directory gets its name
    when it is complete.
    """
    from pyllmlite.compress.quantize import quantize_model
    from pyllmlite.compress.settings import Settings
    from pyllmlite.core.errors import ConfigError

    if out is None:
        raise ConfigError("say where the new model goes: --out DIR")
    settings = Settings(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        plan=read_plan(plan),
        bits_budget=bits_budget,
        layout=layout,
        int8_activations=int8_activations,
        dtype=dtype,
        calibration=calibration,
        num_sequences=num_sequences,
        seq_len=seq_len,
        seed=seed,
        extra=parse_extra(extra),
    )
    with _watcher() as watcher:
        result = quantize_model(
            model,
            out,
            settings,
            force=force,
            restart=restart,
            eval_windows=eval_windows,
            eval_length=eval_length,
            eval_text=eval_text,
            watcher=watcher,
            threads=threads,
        )
    total = sum(f.stat().st_size for f in result.path.rglob("*") if f.is_file())
    if json:
        print_json(
            {"path": str(result.path), "bytes": total, "seconds": result.seconds, **result.facts}
        )
        return
    print(f"{result.path}: {size(total)}, {result.facts['bits_per_weight']:.2f} bits per weight")
    measured = result.facts["measured"]
    if measured:
        print(
            f"KL divergence {measured['kl']:.4f} ± {measured['kl_error']:.4f} nats per token, same "
            f"likeliest token {measured['top1_agreement']:.1%}, perplexity "
            f"{measured['perplexity']:.2f} (was {measured['reference_perplexity']:.2f})"
        )
        if measured["warning"]:
            print(f"beware: {measured['warning']}")


def read_plan(path: str | None) -> dict[str, int]:
    """A JSON file of matrices and their bits; ``ConfigError``: it is none."""
    import json
    from pathlib import Path

    from pyllmlite.core.errors import ConfigError

    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is no JSON ({error})") from None
    if not isinstance(found, dict) or not all(type(bits) is int for bits in found.values()):
        raise ConfigError(f'{path}: a plan is an object such as {{"layers.0.mlp_down": 8}}')
    return found


def clock(seconds: float) -> str:
    """``75`` to ``1:15``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    text = f"{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
    return f"{hours}:{text}" if hours else text


class Estimate:
    """Time left, from the layers of this run: those that an earlier one made cost nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.made = 0

    def add(self, seconds: float) -> None:
        self.seconds += seconds
        self.made += 1

    def left(self, layers: int) -> str:
        return clock(self.seconds / self.made * layers) if self.made else "-:--"


@contextmanager
def _watcher() -> Iterator[Any]:
    """A progress bar on a terminal, else a line a layer, both on standard error."""
    if sys.stderr is not None and sys.stderr.isatty():
        with _bar() as bar:
            yield bar
    else:
        yield _lines()


def _lines() -> Any:
    from pyllmlite.compress.quantize import Watcher

    class Lines(Watcher):
        def start(self, num_layers: int, resumed: int) -> None:
            self.layers, self.done, self.estimate = num_layers, 0, Estimate()
            if resumed:
                _say(f"going on: {resumed} of {num_layers} layers are there")

        def layer(self, index: int, seconds: float, resumed: bool) -> None:
            self.done += 1
            if not resumed:
                self.estimate.add(seconds)
                left = self.estimate.left(self.layers - self.done)
                _say(f"layer {self.done} of {self.layers}: {seconds:.1f} s, {left} left")

    return Lines()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _bar() -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from pyllmlite.compress.quantize import Watcher

    columns = (
        TextColumn("layers"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[left]} left"), TextColumn("[dim]{task.fields[now]}"),
    )  # fmt: skip

    class Bar(Watcher):
        def __init__(self, shown: Progress) -> None:
            self.shown = shown
            self.task: Any = None
            self.estimate = Estimate()
            self.last = 0.0

        def start(self, num_layers: int, resumed: int) -> None:
            self.task = self.shown.add_task("", total=num_layers, left="-:--", now="")
            self.layers, self.done = num_layers, 0

        def layer(self, index: int, seconds: float, resumed: bool) -> None:
            self.done += 1
            if not resumed:
                self.estimate.add(seconds)
            left = self.estimate.left(self.layers - self.done)
            self.shown.update(self.task, completed=self.done, left=left)

        def note(self, text: str) -> None:
            now = time.monotonic()
            if self.task is not None and now - self.last > 0.1:
                self.last = now
                self.shown.update(self.task, now=text)

    with Progress(*columns, console=Console(stderr=True)) as shown:
        yield Bar(shown)
