"""Writes a Hugging Face directory layer by layer, so that a run can be cut off at any moment.

Everything is written into ``DIR.partial``: a shard a layer, complete or not there, and a state that
says which layers are done and with which settings.  The same command goes on from there.  Only
when the directory is whole it gets its name, in one rename; an output that was there before stays
until then.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from pyllmlite.compress.casts import rounded, tensor_entry
from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.compress.layouts import Layout, Scheme
from pyllmlite.compress.model_files import write_model_files
from pyllmlite.compress.place import (
    QUANTIZE_STATE,
    STATE_FOLDER,
    check_place,
    clear,
    occupy,
    publish,
)
from pyllmlite.compress.shard import (
    Entry,
    disk_errors,
    entry,
    write_shard,
    write_text,
)
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.core.weights import LinearWeight
from pyllmlite.model.quantized import reader_for
from pyllmlite.model.safetensors import INDEX, SafetensorsCheckpoint

STATE_VERSION = 1
KEPT = ("int8_activations", "activation_group", "outlier_threshold")  # what no layout says


class DirectoryWriter:
    """Writes one model.

    Args:
        out: The directory that comes out.
        view: The model that is quantized.
        layout: How codes are stored; None: there are none (a cast).
        dtype: Of all other tensors: f32, bf16 or f16.
        settings: What decides the result, as JSON; a partial directory of other settings is not
            gone on with.
        force: Replace ``out`` when the new directory is complete.
        restart: Throw away what an earlier run left.
        reads: Other files and directories that the run reads.
    Raises:
        ConfigError, ModelError: It cannot be written there; nothing was touched.
    """

    def __init__(
        self,
        out: Path,
        view: HFView,
        layout: Layout | None,
        dtype: str,
        settings: dict[str, Any],
        force: bool = False,
        restart: bool = False,
        reads: Iterable[str | Path] = (),
    ) -> None:
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.view = view
        self.layout = layout
        self.dtype = dtype
        self.settings = json.loads(json.dumps(settings))
        self.num_layers = view.source.spec.num_layers
        self.resumed: list[int] = []  # layers that were there already
        self._lock: IO[str] | None = None
        self._fresh = False  # nothing of an earlier run is there
        self._layers: dict[int, dict[str, Any]] = {}
        self._sizes: dict[str, int] = {}
        self._weight_map: dict[str, str] = {}
        check_place(self.out, view.source.path, force, reads)
        if layout is not None:
            for module in view.modules(0):
                why = layout.refusal(view.source.spec.architecture, module.transposed)
                if why is not None:
                    raise ConfigError(why)
        with disk_errors(self.out, "making the directory"):
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self._lock = occupy(self.partial, QUANTIZE_STATE, restart)
        try:
            self._take_up()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DirectoryWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """End the work; a partial directory stays if a layer of it is complete."""
        if self._lock is not None:
            if self._fresh and not self._layers and self.partial.is_dir():
                shutil.rmtree(self.partial, ignore_errors=True)
            self._lock.close()
            self._lock = None

    @property
    def scratch(self) -> Path:
        """A folder for what a run that goes on needs again; it goes away at the end."""
        return self.partial / STATE_FOLDER

    def keep(self) -> None:
        """What stands in :attr:`scratch` is worth going on from, though no layer is complete."""
        self._fresh = False

    # -- layers --------------------------------------------------------------------------------
    def done(self, index: int) -> LayerResult | None:
        """A layer that is written already, as it is read back: the same values; None: it is not."""
        state = self._layers.get(index)
        return None if state is None else self._read_back(index, state)

    def add(self, result: LayerResult) -> None:
        """Write a layer.

        Raises:
            ModelError: The disk is full, a matrix cannot be held by the layout, or a name is not
                one of the layer's.
        """
        entries, state = self._layer_entries(result)
        changed = [
            entry(name, np.asarray(values, np.float32)) for name, values in result.changed.items()
        ]
        if changed:
            write_shard(self._changed_file(result.index), changed)
        file = self._shard_name(result.index)
        nbytes = write_shard(self.partial / file, entries)
        state["names"] = [one.name for one in entries]
        state["nbytes"] = sum(one.nbytes for one in entries)
        self._layers[result.index] = state
        self._save_state()
        self._check_room(nbytes)

    def loss(self) -> dict[int, dict[str, float]]:
        """What the method measured, by layer."""
        return {i: state["loss"] for i, state in sorted(self._layers.items())}

    def schemes(self) -> dict[str, Scheme]:
        """How every quantized module is quantized."""
        return {
            name: Scheme(**scheme)
            for _, state in sorted(self._layers.items())
            for name, scheme in state["schemes"].items()
        }

    def weight_bits(self) -> float:
        """Bits a weight of the decoder layers' matrices takes, scales and zero points included."""
        bits = count = 0
        for i in range(self.num_layers):
            for module in self.view.modules(i):
                count += int(np.prod(module.shape))
                bits += 8 * self._layers[i]["bytes"][module.name]
        return bits / max(count, 1)

    # -- the end -------------------------------------------------------------------------------
    def finish(self, progress: Callable[[str], None] | None = None) -> Path:
        """Write what stands in no layer, the config and the tokenizer; ``DIR.partial`` can be
        loaded afterwards."""
        missing = [i for i in range(self.num_layers) if i not in self._layers]
        if missing:
            raise ModelError(f"layer {missing[0]} of {self.num_layers} was never quantized")
        if progress is not None:
            progress("embeddings, config and tokenizer")
        changed = self._changed_elsewhere()
        entries = [
            entry(name, rounded(name, changed[name], self.dtype), self.dtype)
            if name in changed
            else tensor_entry(self.view.tensor(name), self.dtype)
            for name in self.view.other_names()
        ]
        file = self._shard_name(self.num_layers)
        write_shard(self.partial / file, entries)
        weight_map = {
            name: self._shard_name(i)
            for i, state in sorted(self._layers.items())
            for name in state["names"]
        }
        weight_map |= {one.name: file for one in entries}
        total = sum(one.nbytes for one in entries)
        total += sum(state["nbytes"] for state in self._layers.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(self.partial / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        write_model_files(self.view, self.partial, self._quantization_config(), self.dtype)
        return self.partial

    def publish(self) -> Path:
        """Give the complete directory its name; what stood under it goes away only then."""
        publish(self.partial, self.out)
        return self.out

    # -- inside --------------------------------------------------------------------------------
    def _take_up(self) -> None:
        """Go on with what an earlier run left, as far as it is whole."""
        state_file = self.partial / QUANTIZE_STATE
        if not state_file.is_file():
            self._fresh = True
            clear(self.partial)
            self._save_state()
            return
        try:
            state = json.loads(state_file.read_text())
            settings, layers = state["settings"], state["layers"]
            if state["version"] != STATE_VERSION:
                raise ValueError(f"state of version {state['version']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{state_file}: cannot be read ({error}); --restart begins anew"
            ) from None
        differing = [
            name
            for name in {**settings, **self.settings}
            if settings.get(name) != self.settings.get(name)
        ]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"{self.partial} holds an unfinished run with other settings ({name}: "
                f"{settings.get(name)}, now {self.settings.get(name)}); go on with its settings, "
                "or --restart, which throws it away"
            )
        for word, found in layers.items():
            index = int(word)
            self._layers[index] = found
            try:
                self._read_back(index, found)
            except (ModelError, KeyError):
                del self._layers[index]  # cut off by something else: it is made again
        self.resumed = sorted(self._layers)

    def _save_state(self) -> None:
        state = {
            "version": STATE_VERSION,
            "settings": self.settings,
            "layers": {str(i): state for i, state in sorted(self._layers.items())},
        }
        write_text(self.partial / QUANTIZE_STATE, json.dumps(state))

    def _shard_name(self, index: int) -> str:
        return f"model-{index + 1:05}-of-{self.num_layers + 1:05}.safetensors"

    def _changed_file(self, index: int) -> Path:
        return self.scratch / f"changed-{index:05}.safetensors"

    def _layer_entries(self, result: LayerResult) -> tuple[list[Entry], dict[str, Any]]:
        names = self.view.layer_names(result.index)
        modules = {module.name: module for module in self.view.modules(result.index)}
        state: dict[str, Any] = {
            "loss": {str(word): float(value) for word, value in result.loss.items()},
            "schemes": {},
            "floats": [],
            "kept": {},
            "bytes": {},
            "changed": list(result.changed),
        }
        for name in result.linears:
            if name not in modules:
                raise ModelError(f"layer {result.index} has no matrix {name!r}")
        for name in result.changed:
            if name not in self.view.names():
                raise ModelError(f"the model has no tensor {name!r}")
        entries: list[Entry] = []
        for name in names:
            module = modules.get(name.removesuffix(".weight"))
            if module is not None and name.endswith(".weight"):
                made = self._module_entries(module.name, result, state)
                state["bytes"][module.name] = sum(
                    one.nbytes for one in made if not one.name.endswith(("g_idx", "weight_shape"))
                )
                entries += made
            elif name in result.changed:
                values = rounded(name, result.changed[name], self.dtype)
                entries.append(entry(name, values, self.dtype))
            else:
                entries.append(tensor_entry(self.view.tensor(name), self.dtype))
        return entries, state

    def _module_entries(
        self, name: str, result: LayerResult, state: dict[str, Any]
    ) -> list[Entry]:
        module = next(m for m in self.view.modules(result.index) if m.name == name)
        stored = f"{name}.weight"
        weight = result.linears.get(name)
        if weight is not None and weight.shape != module.shape:
            raise ModelError(
                f"{name} was quantized to {list(weight.shape)}, it is {list(module.shape)}"
            )
        if weight is None or weight.format in ("f32", "bf16"):
            state["floats"].append(name)
            if weight is None and stored in result.changed:
                values = np.asarray(result.changed[stored], np.float32)
            elif weight is None:
                return [tensor_entry(self.view.tensor(stored), self.dtype)]
            else:
                values = weight.float32()
                values = np.ascontiguousarray(values.T) if module.transposed else values
            return [entry(stored, rounded(name, values, self.dtype), self.dtype)]
        if self.layout is None:
            raise ModelError(f"{name} is in codes, and no layout was chosen")
        entries, scheme = self.layout.entries(name, weight)
        state["schemes"][name] = asdict(scheme)
        state["kept"][name] = {word: getattr(weight, word) for word in KEPT}
        return entries

    def _quantization_config(self) -> dict[str, Any] | None:
        schemes = self.schemes()
        if self.layout is None or not schemes:
            return None
        floats = [name for _, state in sorted(self._layers.items()) for name in state["floats"]]
        return self.layout.config(schemes, floats, self.view.head_name())

    def _read_back(self, index: int, state: dict[str, Any]) -> LayerResult:
        path = self.partial / self._shard_name(index)
        stored: Any = SafetensorsCheckpoint(path)
        floats = stored
        schemes = {name: Scheme(**scheme) for name, scheme in state["schemes"].items()}
        if schemes and self.layout is not None:
            config = self.layout.config(schemes, state["floats"], self.view.head_name())
            stored = reader_for(path, config)(stored)
        linears: dict[str, LinearWeight] = {}
        for module in self.view.modules(index):
            tensor = stored.tensor(module.name + ".weight")
            if module.name in schemes:
                linears[module.name] = replace(tensor.codes(), **state["kept"][module.name])
        changed: dict[str, np.ndarray] = {}
        if state["changed"]:
            kept = SafetensorsCheckpoint(self._changed_file(index))
            changed = {name: kept.tensor(name).float32() for name in state["changed"]}
        for name in state["names"]:
            floats.tensor(name)
        return LayerResult(index, linears, changed, dict(state["loss"]))

    def _changed_elsewhere(self) -> dict[str, np.ndarray]:
        """Tensors of no layer that a layer's method rewrote."""
        others = set(self.view.other_names())
        found: dict[str, np.ndarray] = {}
        for index, state in sorted(self._layers.items()):
            names = [name for name in state["changed"] if name in others]
            if names:
                kept = SafetensorsCheckpoint(self._changed_file(index))
                found.update((name, kept.tensor(name).float32()) for name in names)
        return found

    def _check_room(self, layer_bytes: int) -> None:
        """Refuse early what will not fit in the end."""
        left = self.num_layers - len(self._layers)
        item = {"f32": 4}.get(self.dtype, 2)
        others = sum(int(np.prod(self.view.tensor(n).shape)) for n in self.view.other_names())
        needed = left * layer_bytes + others * item
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.partial).free
            if needed > free:
                raise ModelError(
                    f"{self.partial}: {_size(needed)} are still to be written and {_size(free)} "
                    "are free; make room and run the same command again: it goes on from the last "
                    "complete layer"
                )


def _size(count: int) -> str:
    """Bytes in the unit that reads best: ``1.5 GB``, ``12.0 kB``."""
    for unit, word in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {word}"
    return f"{count / 1e3:.1f} kB"
