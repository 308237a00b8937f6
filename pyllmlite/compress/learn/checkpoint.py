"""The state of a run in one file, complete or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pyllmlite.compress.shard import sync, sync_directory
from pyllmlite.core.errors import ConfigError, ModelError

NAME = "checkpoint.pt"
VERSION = 1


def save(directory: Path, state: dict[str, Any]) -> Path:
    """Write ``directory/checkpoint.pt``; the one before stays until this one is on the disk.

    Args:
        state: Tensors, numbers, texts, in dicts and lists.
    Raises:
        ModelError: The disk is full or refuses; the checkpoint before is kept.
    """
    path = directory / NAME
    partial = path.with_name(NAME + ".part")
    try:
        with open(partial, "wb") as file:
            torch.save({"version": VERSION, **state}, file)
            sync(file)
        os.replace(partial, path)
        sync_directory(directory)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns ENOSPC into the latter
        partial.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "the one before is kept" if path.exists() else "there is none yet"
        raise ModelError(f"{path}: the checkpoint cannot be written ({why}); {kept}") from None
    return path


def load(directory: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state that was saved; None: there is none.

    Args:
        identity: What the run must have in common with the one that saved it.
    Raises:
        ConfigError: It belongs to a run with other settings.
        ModelError: It cannot be read.
    """
    path = directory / NAME
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except Exception as error:  # whatever pickle, zip and torch raise on a damaged file
        why = " ".join(str(error).split())[:120]
        raise ModelError(f"{path}: is no checkpoint ({why}); delete it to begin anew") from None
    if version != VERSION:
        raise ModelError(f"{path}: is of version {version}, this release reads {VERSION}")
    _check(path, state["identity"], identity)
    return state


def _check(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    missing = object()
    for name in sorted({*found, *wanted}):
        had, has = found.get(name, missing), wanted.get(name, missing)
        if had != has:
            shown = ["nothing" if v is missing else repr(v) for v in (had, has)]
            raise ConfigError(
                f"{path}: was made with {name} {shown[0]}, now it is {shown[1]}; give the same "
                "settings to go on, another --out, or restart to begin anew"
            )
