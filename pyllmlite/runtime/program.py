"""A Program being built: buffers, external tensors and ops, and the listing of them.

The same object is the ``OpSink`` that attention and cache strategies add their ops to, so
that a third party's op enters by the door that the built-in ones use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.core.errors import PluginError
from pyllmlite.runtime.cost import OpCost
from pyllmlite.runtime.native import native

if TYPE_CHECKING:
    from pyllmlite import _native

ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "i8": 1, "u8": 1, "i32": 4, "u32": 4, "i64": 8}


@dataclass(frozen=True)
class Buffer:
    """A buffer or external tensor of a Program.  ``rows``: tokens, logits, or a count."""

    id: int
    name: str
    rows: str | int
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}[{self.rows},{self.width}]{self.dtype}"


@dataclass(frozen=True)
class OpEntry:
    """One line of the listing.  ``kind``: the op's own name, or ``python``."""

    name: str
    kind: str
    buffers: tuple[Buffer, ...]
    cost: OpCost


@dataclass
class ProgramBuilder:
    """Collects a Program for at most ``max_num_tokens`` tokens a step.

    Attributes:
        program: The native Program; :meth:`finish` makes it ready to run.
        entries: The ops in the order they run.
    """

    max_num_tokens: int
    max_logit_rows: int
    pool: _native.ThreadPool
    program: Any = field(init=False)
    entries: list[OpEntry] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.program = native().Program(self.max_num_tokens, self.max_logit_rows, self.pool)

    def buffer(
        self, name: str, width: int, dtype: str = "f32", rows: str | int = "tokens"
    ) -> Buffer:
        """Memory for ``rows`` rows (``"tokens"``, ``"logits"`` or a count) of ``width``."""
        made = Buffer(self.program.add_buffer(name, rows, width, dtype), name, rows, width, dtype)
        self.buffers.append(made)
        return made

    def columns(self, name: str, buffer: Buffer, first: int, width: int) -> Buffer:
        """Some columns of a buffer, as a buffer that an op can write to."""
        id = self.program.column_view(name, buffer.id, first, width)
        return Buffer(id, name, buffer.rows, width, buffer.dtype)

    def tensor(self, name: str, array: np.ndarray, dtype: str | None = None) -> Buffer:
        """An array as a buffer, kept alive; ``dtype`` says what uint16 bits mean."""
        id = self.program.add_tensor(name, array, dtype)
        words = {
            "float32": "f32",
            "float16": "f16",
            "int8": "i8",
            "uint8": "u8",
            "int32": "i32",
            "uint32": "u32",
            "int64": "i64",
            "uint16": "bf16",
        }
        word = dtype or words.get(str(array.dtype), str(array.dtype))
        rows = array.shape[0] if array.ndim else 1
        width = int(np.prod(array.shape[1:])) if array.ndim > 1 else 1
        return Buffer(id, name, rows, width, word)

    def op(
        self,
        op: Any,
        buffers: list[Any],
        name: str,
        cost: OpCost | None = None,
    ) -> None:
        """Add a native ``Op``, a capsule of the C ABI, or a Python callable.

        Raises:
            PluginError: Neither of these, or a capsule of another ABI version.
        """
        ids = [buffer.id for buffer in buffers]
        if isinstance(op, native().Op):
            self.program.add_op(op, ids, name)
            kind = op.name
        elif type(op).__name__ == "PyCapsule":
            try:
                taken = native().Op.from_capsule(op)
            except ValueError as error:
                raise PluginError(f"op {name!r}: {error}") from None
            self.program.add_op(taken, ids, name)
            kind = taken.name
        elif isinstance(op, Callable):  # type: ignore[arg-type]
            self.program.add_python_op(op, ids, name)
            kind = "python"
        else:
            raise PluginError(
                f"op {name!r} is a {type(op).__name__}; an op is a native Op, a capsule named "
                "'pyllmlite.op.v0', or a Python callable"
            )
        self.entries.append(OpEntry(name, kind, tuple(buffers), cost or OpCost()))

    def default_cost(self, first: int, cost: OpCost) -> None:
        """Give ``cost`` to the last op added since ``first``, if none of them brought its own."""
        added = self.entries[first:]
        if added and all(entry.cost == OpCost() for entry in added):
            self.entries[-1] = replace(added[-1], cost=cost)

    def finish(self) -> Program:
        self.program.finish()
        return Program(self.program, tuple(self.entries), self.max_num_tokens)


@dataclass(frozen=True)
class Program:
    """A finished Program: runs batches, and tells what it consists of."""

    native: Any
    entries: tuple[OpEntry, ...]
    max_num_tokens: int

    def run(self, batch: _native.Batch) -> None:
        """One step, without the GIL.  ``RuntimeError``: an op failed; the Program can run on."""
        self.native.run(batch)

    @property
    def buffer_bytes(self) -> int:
        return self.native.buffer_bytes

    def describe(self, tokens: int = 1, context: int = 1) -> list[dict[str, Any]]:
        """One entry an op: name, kind, buffers, and for a decode step of ``tokens`` sequences
        at ``context`` tokens each the bytes it moves and the multiply-accumulates it does."""
        contexts = [context] * tokens
        return [
            {
                "op": entry.name,
                "kind": entry.kind,
                "buffers": [str(buffer) for buffer in entry.buffers],
                "bytes": entry.cost.bytes(tokens, tokens, contexts),
                "macs": entry.cost.macs(tokens, tokens, tokens * entry.cost.visible(context)),
                "mac_dtype": entry.cost.mac_dtype,
            }
            for entry in self.entries
        ]

    def profile(self) -> list[tuple[str, int, float]]:
        """Per op since profiling was switched on: name, calls, seconds."""
        return self.native.profile()

    def set_profiling(self, on: bool) -> None:
        self.native.set_profiling(on)
