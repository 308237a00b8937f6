"""One decoder layer over the calibration tokens, up to one linear at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pyllmlite.compress.layered_model import LayerCall, LayerLayout


class LayerRun:
    """Runs a layer's four stages (qkv, attn_out, gate_up, mlp_down) chunk by chunk.

    A stage's inputs are computed with the weights that the stages before it have by then.  What
    attention and the MLP's activation make is kept, so that every matrix multiplies the tokens
    once, and attention runs once (the output projection, the smallest, three times).

    Args:
        layer: The module; its linear weights may be replaced between stages.
        calls: The layer's arguments besides the hidden states, for every chunk.
        hidden: Chunks ``[batch, length, hidden]`` of hidden states before the layer.
        buffers: Where what is kept is written, by kind; filled by the first layer and handed to
            the next.  Made anew in every layer, such tensors part the heap into holes that fit
            the next layer's as badly, and memory grows from layer to layer.
    """

    def __init__(
        self,
        layer: Any,
        layout: LayerLayout,
        calls: list[LayerCall],
        hidden: list[torch.Tensor],
        buffers: dict[str, list[torch.Tensor]] | None = None,
    ) -> None:
        self.layer, self.layout, self.calls, self.hidden = layer, layout, calls, hidden
        self._buffers = {} if buffers is None else buffers
        self._kept: dict[str, list[torch.Tensor]] = {}

    def inputs(self, stage: int) -> Iterator[torch.Tensor]:
        """Inputs ``[tokens, in_features]`` of the stage's modules, chunk by chunk."""
        kind = self.layout.stages[stage].kind
        if kind in self._kept:
            for kept in self._kept[kind]:
                yield kept.reshape(-1, kept.shape[-1])
            return
        keep = stage in (1, 3)  # what is made behind attention and the activation
        found: list[torch.Tensor] = []
        for index in range(len(self.hidden)):
            value = self._stop_at(self.layout.stages[stage].modules[0], index, stage)
            if keep:
                value = self._keep(kind, index, value)
                found.append(value)
            yield value.reshape(-1, value.shape[-1])
        if keep:
            self._kept[kind] = found

    def outputs(self) -> Iterator[torch.Tensor]:
        """Hidden states behind the layer, chunk by chunk."""
        for index in range(len(self.hidden)):
            yield self._run(index, self._kept_blocks())

    def advance(self) -> None:
        """The hidden states become those behind the layer, in their place."""
        for hidden, out in zip(self.hidden, self.outputs(), strict=True):
            hidden.copy_(out)

    def _keep(self, kind: str, index: int, value: torch.Tensor) -> torch.Tensor:
        """The value in a buffer of the walk; layers may differ in their sizes."""
        import torch

        buffers = self._buffers.setdefault(kind, [])
        if index == len(buffers):
            buffers.append(value.clone(memory_format=torch.contiguous_format))
        elif buffers[index].shape != value.shape:
            buffers[index] = value.clone(memory_format=torch.contiguous_format)
        else:
            buffers[index].copy_(value)
        return buffers[index]

    def _kept_blocks(self) -> int:
        """Blocks that need not run again: none, attention, attention and MLP."""
        kinds = [self.layout.stages[stage].kind for stage in (1, 3)]
        if kinds[0] not in self._kept:
            return 0
        return 2 if kinds[1] in self._kept else 1

    def _stop_at(self, module: str, index: int, stage: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def take(_: Any, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        handle = self.layer.get_submodule(module).register_forward_pre_hook(take)
        try:
            self._run(index, min(self._kept_blocks(), 1 if stage >= 2 else 0))
        except _Reached:
            pass
        finally:
            handle.remove()
        return seen[0]

    def _run(self, index: int, kept_blocks: int) -> torch.Tensor:
        import torch

        layout, stages = self.layout, self.layout.stages
        with torch.no_grad():
            attention = self._replay(layout.attention, stages[1], index, layout.adds_residual[0])
            mlp = self._replay(layout.mlp, stages[3], index, layout.adds_residual[1])
            with (
                _forward(self.layer, layout.attention, attention if kept_blocks > 0 else None),
                _forward(self.layer, layout.mlp, mlp if kept_blocks > 1 else None),
            ):
                out = self.calls[index](self.layer, self.hidden[index])
        return out[0] if isinstance(out, tuple) else out

    def _replay(
        self, block: str, stage: Any, index: int, adds_residual: bool
    ) -> Callable[..., Any]:
        """A forward of the block that begins at its last linear, with the kept input."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = self._kept[stage.kind][index]
            out = self.layer.get_submodule(stage.modules[0])(kept)
            if adds_residual:
                out = out + (args[1] if len(args) > 1 else kwargs["residual"])
            return (out, None) if block == self.layout.attention else out

        return forward


class _Reached(Exception):
    """The linear whose input is wanted was reached."""


@contextmanager
def _forward(layer: Any, block: str, forward: Callable[..., Any] | None) -> Iterator[None]:
    """The block runs ``forward`` instead of its own, if there is one."""
    if forward is None:
        yield
        return
    module = layer.get_submodule(block)
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
