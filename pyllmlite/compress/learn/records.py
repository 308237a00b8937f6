"""A teacher's text on disk: JSONL, a header and a record a line, to be looked at and gone on with.

The header says what decides the text.  A record is complete in its line or not there; what was cut
off at the end of an unfinished file is written anew, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from pyllmlite.core.errors import ConfigError, ModelError

FORMAT = "pyllmlite teacher text"
VERSION = 1


@dataclass
class Record:
    """What the teacher wrote to one prompt.

    Attributes:
        index: Position in the file, from 0.
        prompt, prompt_token_ids: What it was given, with the chat template's words.
        text, token_ids: What it wrote; the end token is among the ids.
        finish_reason: ``stop`` or ``length``.
        confidence: Geometric mean of the tokens' probabilities.
        repetition: Share of 4-grams that stood there before.
        source: Number of the prompt in the file of prompts, -1 for one of the teacher's own:
            answers to one prompt are held out together or not at all.
        dropped: The filter that took it out; None: it is learnt from.
    """

    index: int
    prompt: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    confidence: float
    repetition: float
    source: int = -1
    dropped: str | None = None


class RecordFile:
    """A file that records are appended to.

    Args:
        settings: What decides its content, as JSON.
        count: Records that a complete file has.
    Raises:
        ConfigError: The file was written with other settings, or is none of these.
    """

    def __init__(self, path: Path, settings: dict[str, Any], count: int) -> None:
        self.path = path
        self.count = count
        header = {"format": FORMAT, "version": VERSION, "count": count, "settings": settings}
        header = json.loads(json.dumps(header))
        self.records: list[Record] = []
        kept = 0
        if path.exists() and path.stat().st_size:
            found, self.records, kept = _parse(path, unfinished=True)
            if found is not None:
                _check_header(path, found, header)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = open(path, "r+b" if path.exists() else "w+b")
            self._file.truncate(kept)
            self._file.seek(0, os.SEEK_END)
            if not kept:
                self._write(header)
        except OSError as error:
            raise ModelError(f"{path}: cannot be written ({error.strerror})") from None

    @property
    def complete(self) -> bool:
        return len(self.records) >= self.count

    def add(self, records: list[Record]) -> None:
        """Append; on the disk when it returns."""
        try:
            for record in records:
                self._write(asdict(record))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ModelError(
                f"{self.path}: {error.strerror}; what was written before is kept, the same command "
                "goes on from there"
            ) from None
        self.records += records

    def close(self) -> None:
        self._file.close()

    def _write(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")


def read_records(path: Path, vocab_size: int | None = None) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a complete file.

    Args:
        vocab_size: Token ids must be below it.
    Raises:
        ConfigError: One line: it is empty, cut off, unfinished, or not what it should be.
    """
    header, records, _ = _parse(path)
    assert header is not None
    count = header.get("count")
    if len(records) != count:
        raise ConfigError(
            f"{path}: has {len(records)} of {count} records: it is unfinished or was cut off; let "
            "the command that writes it go on"
        )
    if vocab_size is not None:
        for record in records:
            largest = max([*record.prompt_token_ids, *record.token_ids], default=0)
            if largest >= vocab_size:
                raise ConfigError(
                    f"{path}: record {record.index} has the token {largest}, the model's "
                    f"vocabulary ends at {vocab_size - 1}: it was written with another vocabulary"
                )
    return header, records


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _parse(path: Path, unfinished: bool = False) -> tuple[dict[str, Any] | None, list[Record], int]:
    """Header, records, and the bytes that they take.

    Args:
        unfinished: A last line that is cut off is left out, and a file of nothing else is empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if not data.strip():
        raise ConfigError(f"{path}: is empty")
    header: dict[str, Any] | None = None
    records: list[Record] = []
    at = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        ends = line.endswith(b"\n")
        try:
            value = json.loads(line) if ends or not unfinished else None
            if value is None:
                break
            if header is None:
                header = _header(path, value)
            else:
                records.append(_record(value, len(records)))
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
            cut = "is cut off" if not ends else f"is no record ({_first_words(error)})"
            raise ConfigError(f"{path}: line {number} {cut}") from None
        at += len(line)
    if header is None and not unfinished:
        raise ConfigError(f"{path}: line 1 is cut off")
    return header, records, at


def _header(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: is no teacher text: its first line must be the header that this command "
            "writes"
        )
    if value.get("version") != VERSION:
        raise ConfigError(
            f"{path}: is of version {value.get('version')}, this release reads {VERSION}"
        )
    return value


def _record(value: Any, index: int) -> Record:
    record = Record(**value)
    if record.index != index:
        raise ValueError(f"index {record.index}, expected {index}")
    for ids in (record.prompt_token_ids, record.token_ids):
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError("token ids must be lists of integers from 0")
    return record


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def _check_header(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found == wanted:
        return
    had, has = {**found, **found["settings"]}, {**wanted, **wanted["settings"]}
    name = next(
        (n for n in {**had, **has} if n != "settings" and had.get(n) != has.get(n)), "settings"
    )
    raise ConfigError(
        f"{path}: was written with {name} {had.get(name)!r}, now it is {has.get(name)!r}; give the "
        "same options, or --restart to begin anew"
    )
