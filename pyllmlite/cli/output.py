"""How commands print: JSON for programs, aligned columns for people."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any


def _plain(value: Any) -> Any:
    """NaN and infinity have no JSON; NumPy scalars and paths become what they say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "item"):
        return _plain(value.item())
    return str(value)


def print_json(value: Any) -> None:
    """One JSON document on stdout, strictly valid."""
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    # Lists of numbers on one line.  No string is touched: in JSON none holds a line break.
    print(re.sub(r"\[\n[-+.\deE,\s]*\]", lambda m: f"[{' '.join(m[0][1:-1].split())}]", text))


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell; numbers to the right."""
    rows = [list(row) for row in rows]
    cells = [[("" if c is None else str(c)) for c in row] for row in rows]
    widths = [max([len(h)] + [len(row[i]) for row in cells]) for i, h in enumerate(head)]
    right = [
        bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        for i in range(len(head))
    ]

    def line(row: Sequence[str]) -> str:
        parts = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ]
        return "  ".join(parts).rstrip()

    print(line(head))
    for row in cells:
        print(line(row))


def size(num_bytes: float) -> str:
    """``1536`` to ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def count(number: float) -> str:
    """``1500`` to ``1.50 K``: operations, parameters."""
    for unit in ("", " K", " M", " G"):
        if abs(number) < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
