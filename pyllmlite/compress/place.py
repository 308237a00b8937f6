"""The directory that a long command makes: one run at a time, a name only when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from pyllmlite.compress.shard import disk_errors, sync_directory
from pyllmlite.core.errors import ConfigError, ModelError

STATE_FOLDER = ".pyllmlite"  # in ``OUT.partial``: the lock, and what a run that goes on needs
LOCK = f"{STATE_FOLDER}/lock"  # the same of all commands: one of them at a time
# In ``OUT.partial``, what says that a run of this command is unfinished there.
QUANTIZE_STATE = f"{STATE_FOLDER}/state.json"  # of qat too
SHARE_KV_STATE = f"{STATE_FOLDER}/settings.json"
DISTILL_STATE = "distill/settings.json"
_COMMANDS = {QUANTIZE_STATE: "quantize", SHARE_KV_STATE: "share-kv", DISTILL_STATE: "distill"}


def check_place(out: Path, source: Path, force: bool, reads: Iterable[str | Path] = ()) -> None:
    """``ConfigError`` where a new directory cannot stand.

    Args:
        source: The model that it is made from.
        force: What is there may be replaced.
        reads: What else the run is given; names of no file (a quantizer's, a data set's) are none.
    """
    _check_apart(out, source, "the model that is read")
    for path in reads:
        if os.path.exists(path):
            _check_apart(out, Path(path), f"{path}, which is read")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is no directory; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ConfigError(
            f"{out} exists; choose another --out, or --force, which replaces it when the "
            "new one is complete"
        )


def _check_apart(out: Path, read: Path, words: str) -> None:
    """What is read lies neither in the directory, which --force replaces, nor in the unfinished
    one, which --restart throws away."""
    read = Path(os.path.realpath(read))
    for place in (out, out.with_name(out.name + ".partial")):
        if Path(os.path.realpath(place)) in (read, *read.parents):
            raise ConfigError(f"{place} holds {words}; choose another --out")


def occupy(partial: Path, state: str, restart: bool) -> IO[str]:
    """Make the directory of an unfinished run, or take up the one that is there.

    Args:
        state: Where in it the command keeps its state: ``QUANTIZE_STATE`` and the like.
        restart: Throw away what is there, whose ever it is.
    Returns:
        The lock; close it at the end.
    Raises:
        ConfigError: There is something that is not this command's; nothing was touched.
        ModelError: Another run is writing there, or the disk refuses.
    """
    with disk_errors(partial, "making the directory"):
        (partial / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = locked(partial / LOCK)
        try:
            if restart:
                clear(partial)
            else:
                _check_own(partial, state)
        except BaseException:
            lock.close()
            raise
    return lock


def clear(partial: Path) -> None:
    """Remove all but the lock, which is held."""
    for path in [*partial.iterdir(), *(partial / STATE_FOLDER).iterdir()]:
        if path in (partial / STATE_FOLDER, partial / LOCK):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def content(partial: Path, state: str) -> list[str]:
    """What lies there beside the lock and the state; nothing: nothing was done yet."""
    bare = {STATE_FOLDER, LOCK, Path(state).parent.as_posix(), state, state + ".part"}
    found = [path.relative_to(partial).as_posix() for path in sorted(partial.rglob("*"))]
    return [name for name in found if name not in bare]


def _check_own(partial: Path, state: str) -> None:
    for other, command in _COMMANDS.items():
        if other != state and (partial / other).is_file():
            if other == QUANTIZE_STATE and _is_qat(partial / other):
                command = "qat"
            raise ConfigError(
                f"{partial} holds an unfinished run of {command}; finish it with its own command, "
                "choose another --out, or --restart, which throws it away"
            )
    if (partial / state).is_file():
        return
    strange = content(partial, state)
    if strange:
        raise ConfigError(
            f"{partial} holds {strange[0]}, which no unfinished run of this command left; choose "
            "another --out, or --restart, which throws all of it away"
        )


def _is_qat(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["settings"]["method"] == "qat")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def publish(partial: Path, out: Path) -> None:
    """Give the complete directory its name; what stood under it goes away only then.

    So does the scratch of the run: cut off before the rename, it goes on from there.
    """
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
        shutil.rmtree(out / STATE_FOLDER, ignore_errors=True)
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
    try:
        same = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        same = False
    if not same:  # the run that held it has just ended and took the directory away
        file.close()
        raise ModelError(f"{path.parent}: another run has just ended there; try again")
    return file
