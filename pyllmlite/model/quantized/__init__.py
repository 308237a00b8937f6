"""Checkpoints that other tools quantized, read as they come and never rounded again.

A reader turns the tensors that stand for one matrix (codes, scales, zero points, ...) into a
:class:`QuantizedTensor` under the matrix's plain name, so that the rest of the loader sees a
checkpoint like any other.  One file a layout; :func:`reader_for` finds it by the config.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyllmlite.core.errors import ModelError
from pyllmlite.model.checkpoint import Checkpoint
from pyllmlite.model.quantized.awq import awq_reader
from pyllmlite.model.quantized.bitsandbytes import bitsandbytes_reader
from pyllmlite.model.quantized.compressed_tensors import compressed_tensors_reader
from pyllmlite.model.quantized.gptq import gptq_reader

Reader = Callable[[Checkpoint], Checkpoint]

_READERS: dict[str, Callable[[dict[str, Any]], Reader]] = {
    "gptq": gptq_reader,
    "awq": awq_reader,
    "compressed-tensors": compressed_tensors_reader,
    "bitsandbytes": bitsandbytes_reader,
}


def reader_for(path: Path, settings: Any) -> Reader:
    """The reader that a ``quantization_config`` asks for.

    Raises:
        ModelError: The scheme is not known, or a setting of it is not; naming what is.
    """
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: quantization_config is no object")
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"  # configs of before the word was written
    make = _READERS.get(str(method))
    if make is None:
        raise ModelError(
            f"{path}: quantized with {str(method)[:40]!r}, which is not read; known are "
            f"{', '.join(_READERS)}"
        )
    try:
        return make(settings)
    except ModelError as error:
        raise ModelError(f"{path}: {method}: {error}") from None
