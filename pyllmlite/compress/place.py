"""The directory that a long command makes: one run at a time, a name only when it is complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import IO

from pyllmlite.compress.shard import disk_errors, sync_directory
from pyllmlite.core.errors import ConfigError, ModelError


def check_place(out: Path, source: Path, force: bool) -> None:
    """``ConfigError`` where a new directory cannot stand.

    Args:
        source: The model that it is made from.
        force: What is there may be replaced.
    """
    source = Path(os.path.realpath(source))
    if Path(os.path.realpath(out)) in (source, *source.parents):
        raise ConfigError(f"{out} holds the model that is read; choose another --out")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is no directory; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ConfigError(
            f"{out} exists; choose another --out, or --force, which replaces it when the "
            "new one is complete"
        )


def publish(partial: Path, out: Path) -> None:
    """Give the complete directory its name; what stood under it goes away only then."""
    with disk_errors(out, "giving the directory its name"):
        sync_directory(partial)
        old = None
        if out.is_dir() and any(out.iterdir()):
            old = out.with_name(f"{out.name}.old-{os.getpid()}")
            os.rename(out, old)
        try:
            os.rename(partial, out)
        except OSError:
            if old is not None:
                os.rename(old, out)
            raise
        sync_directory(out.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def locked(path: Path) -> IO[str]:
    """One run at a time in the file's directory; the lock ends with the process that holds it."""
    file = open(path, "w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no POSIX system: nobody is kept out
        pass
    except OSError:
        file.close()
        raise ModelError(f"{path.parent}: another run is writing there") from None
    return file
