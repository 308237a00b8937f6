"""``pyllmlite pull``: bring a model onto this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from pyllmlite.cli.output import print_json


def pull(
    name: Annotated[
        str | None,
        typer.Argument(
            help="An alias or a hub id (org/model); default: smollm2-135m.", show_default=False
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fetch a model once; what is here already is not fetched again."""
    from pyllmlite.model.hub import DEFAULT_MODEL, resolve

    path = resolve(name, revision=revision)
    if json:
        print_json({"model": name or DEFAULT_MODEL, "path": str(path)})
    else:
        print(path)
