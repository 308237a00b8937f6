"""Options of strategies by name: one that nobody reads is a mistake, not a silence."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pyllmlite.core.errors import ConfigError


class Options(dict[str, Any]):
    """``extra``, with the names that strategies have looked for."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:  # all of them, ``dict(extra)`` and ``**extra`` too
        self.read.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self.read.update(super().keys())
        return super().keys()

    def items(self) -> Any:
        self.read.update(super().keys())
        return super().items()

    def hint(self, name: str, value: Any) -> None:
        """An option that a strategy may read or not; what the user said stands."""
        dict.setdefault(self, name, value)
        self.read.add(name)

    def check(self) -> None:
        """``ConfigError`` for a name that no strategy has looked for."""
        known = sorted(self.read)
        for name in dict.keys(self):
            if name in self.read:
                continue
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"read: {', '.join(known) or 'none'}"
            raise ConfigError(f"no chosen strategy reads extra[{name!r}]; {hint}")
