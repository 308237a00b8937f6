"""The entry point: which commands there are, and how an error meets the user."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from pyllmlite.cli import (
    bench,
    distill,
    eval,
    explain,
    generate,
    info,
    new_plugin,
    plan,
    pull,
    qat,
    quantize,
    serve,
    serve_sim,
    share_kv,
)

app = typer.Typer(
    name="pyllmlite",
    help="Run language models on the CPU, with every strategy a plugin.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich would double the time that --help takes
    pretty_exceptions_enable=False,
)
app.command()(generate.run)
app.command()(generate.chat)
app.command()(pull.pull)
app.command()(info.info)
app.command()(info.plugins)
app.command()(explain.explain)
app.command()(quantize.quantize)
app.command()(qat.qat)
app.command("share-kv")(share_kv.share_kv)
app.command()(distill.distill)
app.command()(serve.serve)
app.command("eval")(eval.evaluate)
app.command()(plan.plan)
bench.app.command("serve-sim")(serve_sim.serve_sim)
app.add_typer(bench.app, name="bench")
app.command("new-plugin")(new_plugin.new_plugin)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pyllmlite {info.version()}")
        raise typer.Exit


def _print_cmake_dir(wanted: bool) -> None:
    if wanted:
        print(info.cmake_dir())
        raise typer.Exit


def _print_include_dir(wanted: bool) -> None:
    if wanted:
        print(info.include_dir())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say the version."),
    ] = False,
    cmake_dir: Annotated[
        bool,
        typer.Option(
            "--cmake-dir",
            callback=_print_cmake_dir,
            is_eager=True,
            help="Say where pyllmliteConfig.cmake is: -Dpyllmlite_DIR=$(pyllmlite --cmake-dir).",
        ),
    ] = False,
    include_dir: Annotated[
        bool,
        typer.Option(
            "--include-dir",
            callback=_print_include_dir,
            is_eager=True,
            help="Say where the C++ headers are.",
        ),
    ] = False,
) -> None:
    pass


def _is_on_purpose(error: Exception) -> bool:
    from pyllmlite.core.errors import PyllmliteError

    return isinstance(error, PyllmliteError)


def main() -> None:
    """Run the command line; exit code 0, 1 (failed), 2 (usage), 130 (interrupted)."""
    if sys.stdout is None:  # closed by whoever started it
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    debug = os.environ.get("PYLLMLITE_DEBUG", "") not in ("", "0")
    try:
        app()
        sys.stdout.flush()
    except SystemExit as leaving:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _silence_stdout()
            raise SystemExit(leaving.code or 0) from None
        raise
    except BrokenPipeError:
        _silence_stdout()
        raise SystemExit(141) from None  # as a shell reports SIGPIPE
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        if not _is_on_purpose(error):
            line = f"{type(error).__name__}: {line} (PYLLMLITE_DEBUG=1 shows where)"
        print(f"pyllmlite: error: {line}", file=sys.stderr)
        raise SystemExit(1) from None


def _silence_stdout() -> None:
    """The reader went away: let the interpreter's last flush go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
