"""What a run has logged: a JSON object a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

LOG = "log.jsonl"


@dataclass
class History:
    """A record a step: ``step`` (counted from 1), ``loss``, ``learning_rate``, ``grad_norm``,
    ``tokens``, ``seconds`` and the objective's metrics; where it was measured, what ``evaluate``
    gave, as ``eval_NAME``.  What was measured before the first step is a record of step 0.

    Attributes:
        out: Directory of the run.
        resumed: Steps that an earlier run had made.
    """

    out: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    resumed: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def values(self, name: str) -> list[tuple[int, float]]:
        """(step, value) where it was logged."""
        return [(r["step"], r[name]) for r in self.records if name in r]

    def last(self, name: str, default: float = math.nan) -> float:
        """The latest value of a name."""
        return next((r[name] for r in reversed(self.records) if name in r), default)


class Log:
    """``log.jsonl``, line by line; lines past ``step`` (of a run that was cut off behind its last
    checkpoint) are taken out first.

    Args:
        write: False on ranks that keep the records in memory only.
    """

    def __init__(self, out: Path, step: int, write: bool = True) -> None:
        self.history = History(out, read_log(out / LOG, step) if step else [], resumed=step)
        self._file: IO[str] | None = None
        if write:
            path = out / LOG
            partial = path.with_name(LOG + ".part")
            with open(partial, "w", encoding="utf-8") as file:
                file.writelines(_line(record) for record in self.history.records)
            os.replace(partial, path)
            self._file = open(path, "a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        self.history.records.append(record)
        if self._file is not None:
            self._file.write(_line(record))
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_log(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """Records up to step ``last``, and up to a line that was cut off."""
    records: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return records
    for line in lines:
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError):
            break
        if last is not None and step > last:
            break
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
