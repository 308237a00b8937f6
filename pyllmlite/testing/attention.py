"""The suite for attentions: ragged paged batches beside dense NumPy attention."""

from __future__ import annotations

from typing import Any

from pyllmlite.core.errors import PluginError
from pyllmlite.testing.base import Conformance
from pyllmlite.testing.native_step import HeadShape, check_against_dense


class AttentionConformance(Conformance):
    """``strategy``: the attention's class.  What ``supports`` refuses is left out, but it must
    take something.

    Attributes:
        cache: Class of the cache whose layout it reads; None: what ``auto`` chooses.
        shapes: Heads, KV heads, head size.
        tolerance: Largest absolute error for values of about 1; None: by storage dtype.
    """

    contract = "attention"
    cache: Any = None
    shapes = (
        HeadShape(4, 4, 16),
        HeadShape(8, 2, 32),
        HeadShape(3, 1, 64),
        HeadShape(2, 1, 20),  # no multiple of a vector
        HeadShape(6, 2, 80),
        HeadShape(2, 2, 128),
    )
    tolerance: float | None = None

    def check(self, shape: HeadShape, *windows: int | None, **options: Any) -> bool:
        """False: the attention says that it does not do this."""
        try:
            check_against_dense(
                self.cache, self.strategy, shape, windows, tolerance=self.tolerance, **options
            )
        except PluginError:
            return False
        return True

    def test_shapes(self) -> None:
        done = [self.check(shape, None) for shape in self.shapes]
        assert any(done), "supports() refuses every shape of the suite"

    def test_bf16(self) -> None:
        for shape in self.shapes[:4]:
            self.check(shape, None, dtype="bf16")

    def test_windows(self) -> None:
        for window in (1, 15, 16, 17, 40, 200):
            self.check(self.shapes[1], window)

    def test_sinks(self) -> None:
        """First tokens besides the window, at positions within the cache."""
        for window, sinks in ((1, 1), (20, 4), (17, 30)):
            self.check(self.shapes[1], window, sinks=sinks, rotary_dim=16)
        self.check(self.shapes[4], 24, None, sinks=4, alibi=True, softcap=2.0)
        self.check(self.shapes[2], 33, sinks=4, rotary_dim=64, dtype="bf16")

    def test_layers_with_and_without_window(self) -> None:
        self.check(self.shapes[0], 24, None, 24)

    def test_softcap(self) -> None:
        for shape in self.shapes[:3]:
            self.check(shape, None, softcap=2.0)

    def test_alibi(self) -> None:
        for shape in self.shapes[:3]:
            self.check(shape, None, alibi=True)

    def test_all_together(self) -> None:
        self.check(self.shapes[1], 20, None, softcap=5.0, alibi=True, rotary_dim=16, dtype="bf16")

    def test_threads(self) -> None:
        for threads in (1, 3):
            self.check(self.shapes[2], 33, None, threads=threads)
