"""Methods that look at what flows through the model: calibration text, then layer by layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.compress.bits import plan_bits
from pyllmlite.compress.calibration import DEFAULT_LENGTH, DEFAULT_SEQUENCES, calibration_tokens
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.compress.layerwise import MethodSettings, Quantizers, quantize_layers
from pyllmlite.compress.shard import disk_errors, write_text
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.hooks.registry import Registry

if TYPE_CHECKING:
    from pyllmlite.compress.hf_view import HFView
    from pyllmlite.compress.settings import Settings

TOKENS, PLAN = "calibration.npy", "plan.json"


def file_sha256(text: str) -> str | None:
    """Of a file of calibration text; None: ``text`` is the name of no file.  ``ConfigError``: it
    cannot be read."""
    try:
        path = Path(text)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except OSError as error:
        raise ConfigError(f"{text}: cannot be read ({error.strerror})") from None


class CalibratedMethod:
    """Goes through the layers by :func:`pyllmlite.compress.layerwise.quantize_layers`.

    Raises:
        ConfigError, PluginError: Settings that cannot work, or that the method does not read.
    """

    calibrated = True

    def __init__(self, view: HFView, settings: Settings) -> None:
        self.view = view
        self.settings = settings
        self.asked = MethodSettings(
            quantizer=settings.method,
            bits=settings.bits,
            group_size=settings.group_size,
            symmetric=settings.symmetric,
            plan=dict(settings.plan),
            extra=dict(settings.extra),
            integer_zeros=True,
        )
        self.planned: dict[str, Any] = {}  # what a bits budget decided, once it has
        Quantizers(view.source, self.asked, Registry.load())  # refused now, not behind the text
        self.num_sequences = settings.num_sequences or DEFAULT_SEQUENCES
        positions = view.source.spec.max_position_embeddings
        self.seq_len = settings.seq_len or min(DEFAULT_LENGTH, positions)
        self.text_sha256 = file_sha256(settings.calibration)

    def facts(self) -> dict[str, Any]:
        """What the card says of the calibration."""
        return {
            "text": self.settings.calibration,
            "sha256": self.text_sha256,
            "num_sequences": self.num_sequences,
            "seq_len": self.seq_len,
            "seed": self.settings.seed,
        }

    def layers(
        self,
        done: Callable[[int], LayerResult | None],
        note: Callable[[str], None],
        scratch: Path,
    ) -> Iterator[LayerResult]:
        """Results under the checkpoint's names; ``scratch`` keeps the tokens, so that a run that
        goes on has the very same."""
        tokens, asked = self._tokens(note, scratch), self.asked
        if self.settings.bits_budget is not None:
            plan, group_size = self._plan(asked, tokens, self.settings.bits_budget, note, scratch)
            self.planned = {"plan": plan}
            if group_size is not None:
                self.planned["group_size"] = group_size
            asked = replace(asked, **self.planned)

        def known(index: int) -> LayerResult | None:
            found = done(index)
            return None if found is None else self._renamed(found, self._theirs(index))

        note("layer 0")
        for result in quantize_layers(self.view.source, asked, tokens, done=known):
            ours = self.view.layer_prefix(result.index)
            yield self._renamed(result, ours)
            note(f"layer {result.index + 1}")

    def _tokens(self, note: Callable[[str], None], scratch: Path) -> np.ndarray:
        path = scratch / TOKENS
        wanted = (self.num_sequences, self.seq_len)
        if path.is_file():
            try:
                tokens = np.load(path, allow_pickle=False)
            except (OSError, ValueError, EOFError):
                tokens = np.empty((0, 0), np.int32)
            if tokens.shape == wanted:
                return tokens

        def progress(done: int, total: int) -> None:
            note(f"calibration text: {done} of {total} sequences")

        settings = self.settings
        note("calibration text")
        tokens = calibration_tokens(
            self.view.source, settings.calibration, *wanted, settings.seed, progress
        )
        with disk_errors(path, "keeping the calibration tokens"):
            np.save(path, tokens, allow_pickle=False)
        return tokens

    def _plan(
        self,
        asked: MethodSettings,
        tokens: np.ndarray,
        budget: float,
        note: Callable[[str], None],
        scratch: Path,
    ) -> tuple[dict[str, int], int | None]:
        """Bits of every matrix within the budget, and the group size that goes with them (None: the
        one that was asked for); kept, so that a run that goes on has the same."""
        path = scratch / PLAN
        if path.is_file():
            found = json.loads(path.read_text())
            return found["plan"], found["group_size"]
        note("planning bits")
        made = plan_bits(
            self.view.source,
            asked,
            tokens,
            budget,
            progress=lambda done, total: note(f"planning bits: {done} of {total}"),
        )
        write_text(path, json.dumps({"plan": made.plan, "group_size": made.group_size}))
        return made.plan, made.group_size

    def _theirs(self, index: int) -> str:
        """transformers' prefix of a layer: the checkpoint's, with the body's own in front, which a
        checkpoint of the body alone lacks."""
        take = self.view.architecture.tensors["layers.{i}.attn_norm.weight"][0]
        prefix = self.view.architecture.prefixes[0]
        return take.name.split("{i}")[0].replace("{p}", prefix) + f"{index}."

    @staticmethod
    def _renamed(result: LayerResult, start: str) -> LayerResult:
        """With another prefix in front of the layer's names."""
        marker = f".{result.index}."

        def name(full: str) -> str:
            before, found, rest = ("." + full).partition(marker)
            if not found:
                raise ModelError(f"{full!r} is no name of layer {result.index}")
            return start + rest

        linears = {name(full): weight for full, weight in result.linears.items()}
        changed = {name(full): values for full, values in result.changed.items()}
        if linears.keys() == result.linears.keys() and changed.keys() == result.changed.keys():
            return result
        return replace(result, linears=linears, changed=changed)
