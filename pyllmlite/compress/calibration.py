"""Calibration tokens: text that the model writes itself, a file, or a data set.

The number of sequences, their length and the seed decide the result exactly; where the text comes
from a file or a data set, so does its content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.core.errors import ConfigError

if TYPE_CHECKING:
    from pyllmlite.model.source import ModelSource

SELF = "self"
DEFAULT_SEQUENCES = 64
DEFAULT_LENGTH = 512
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".json", ".jsonl", ".ndjson", ".text")
TEXT_FIELDS = ("text", "content", "prompt", "messages", "conversations")
DATASET_SPARE = 4  # data sets are read for up to this many times the tokens, then drawn from
_PARALLEL = 16  # sequences that the model writes at once


def calibration_tokens(
    source: ModelSource,
    text: str = SELF,
    sequences: int = DEFAULT_SEQUENCES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Token ids to calibrate with, int32 ``[sequences, length]``.

    Args:
        text: ``self``: the model writes it; a text file (UTF-8) or a JSONL file, whose objects have
            a ``text``, ``content``, ``prompt`` or ``messages``; else the name of a data set of the
            ``datasets`` library: ``org/name``, ``org/name:split`` or ``org/name/config:split``.
        progress: Called with (sequences written, sequences in all) while the model writes.
    Raises:
        ConfigError: One line: the file is empty, of another encoding, or too short; ``datasets`` is
            not installed or does not know the name; sequences longer than the model's positions.
    """
    positions = source.spec.max_position_embeddings
    if sequences < 1 or not 2 <= length <= positions:
        raise ConfigError(
            f"calibration needs at least 1 sequence of 2 to {positions} tokens, "
            f"got {sequences} of {length}"
        )
    if text == SELF:
        return self_written(source, sequences, length, seed, progress)
    path = Path(text)
    if path.is_dir():
        raise ConfigError(f"{path}: calibration text is a file, this is a directory")
    if path.is_file():
        return _windows(source, read_texts(path), str(path), sequences, length, seed)
    if path.suffix.lower() in TEXT_SUFFIXES:
        raise ConfigError(f"{path}: no such file (calibration text)")
    return _windows(source, dataset_texts(text), text, sequences, length, seed)


def self_written(
    source: ModelSource,
    sequences: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Text that the model writes: each sequence begins with BOS (if there is one) and a token drawn
    from the vocabulary, the rest is sampled at temperature 1 through the engine (LLM-QAT, Liu et
    al. 2023, section 3.1).  The model goes on after an end of text, as it was trained to."""
    from pyllmlite.core.config import EngineConfig
    from pyllmlite.core.sampling import SamplingParams
    from pyllmlite.engine.llm import LLM
    from pyllmlite.model.build import build

    tokenizer = source.tokenizer()
    config = EngineConfig.from_kwargs(
        max_model_len=length,
        max_num_seqs=min(sequences, _PARALLEL),
        enable_prefix_caching=False,
        seed=seed,
    )
    llm = LLM.from_built(build(source, config))
    special = set(tokenizer.all_special_ids) | set(source.spec.eos_token_ids)
    plain = np.array([i for i in range(source.spec.vocab_size) if i not in special])
    rng = np.random.default_rng(seed)
    starts = rng.choice(plain, size=sequences)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = [[*bos, int(first)][:length] for first in starts]
    result = np.empty((sequences, length), np.int32)
    for first in range(0, sequences, _PARALLEL):
        part = prompts[first : first + _PARALLEL]
        params = [
            SamplingParams(
                temperature=1.0,
                seed=seed * 1_000_003 + first + i,
                max_tokens=max(length - len(prompt), 1),
                ignore_eos=True,
                detokenize=False,
            )
            for i, prompt in enumerate(part)
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in part], params, use_tqdm=False
        )
        for i, (prompt, output) in enumerate(zip(part, outputs, strict=True)):
            ids = [*prompt, *output.outputs[0].token_ids][:length]
            if len(ids) < length:
                raise ConfigError(
                    f"the model wrote {len(ids)} of {length} tokens of calibration text "
                    f"({output.outputs[0].finish_reason}); give a text file instead"
                )
            result[first + i] = ids
        if progress is not None:
            progress(min(first + _PARALLEL, sequences), sequences)
    return result


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file: the whole of a text file, the objects of a JSONL file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if not data.strip():
        raise ConfigError(f"{path}: is empty, calibration needs text")
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 (byte {data[error.start]:#04x} at {error.start}); "
            "convert it, for instance with iconv -t UTF-8"
        ) from None
    if "\0" in content:
        raise ConfigError(f"{path}: holds zero bytes, it is not UTF-8 text")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        yield content
        return
    # Not splitlines(): JSON leaves U+2028 and others of its ends of lines within strings.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}: line {number} is no JSON ({error})") from None
        yield text_of(record, f"{path}: line {number}")


def text_of(record: Any, where: str) -> str:
    """The text of a JSON record: a string, one of :data:`TEXT_FIELDS`, or the contents of its
    messages."""
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for field in TEXT_FIELDS:
            value = record.get(field)
            if isinstance(value, str):
                return value
            if isinstance(value, list):
                parts = [m.get("content", m.get("value")) for m in value if isinstance(m, dict)]
                return "\n".join(part for part in parts if isinstance(part, str))
    raise ConfigError(f"{where} has no text; looked for {', '.join(TEXT_FIELDS)}")


def dataset_texts(name: str) -> Iterator[str]:
    """The records of a data set, by the ``datasets`` library, in their order."""
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ConfigError(
            f"calibration text {name!r} is no file; as the name of a data set it needs the "
            "datasets library: pip install datasets"
        ) from None
    base, _, split = name.partition(":")
    parts = base.split("/")
    arguments = ["/".join(parts[:2]), *parts[2:3]]
    try:
        records = datasets.load_dataset(*arguments, split=split or "train", streaming=True)
        for number, record in enumerate(records):
            yield text_of(record, f"data set {name}: record {number}")
    except ConfigError:
        raise
    except Exception as error:  # whatever the library, the network or the data set's code raise
        text = " ".join(str(error).split())[:200]
        raise ConfigError(f"data set {name!r} cannot be read: {text}") from None


def _windows(
    source: ModelSource,
    texts: Iterable[str],
    name: str,
    sequences: int,
    length: int,
    seed: int,
) -> np.ndarray:
    """Windows of ``length`` tokens, drawn without overlap; documents are joined by an end of text.

    The texts are cut into consecutive windows; ``sequences`` of them are drawn by the seed and kept
    in the order of the text."""
    tokenizer = source.tokenizer()
    wanted = sequences * length
    ids: list[int] = []
    for text in texts:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer.encode(text, add_special_tokens=False)
        if len(ids) >= wanted * DATASET_SPARE and not Path(name).is_file():
            break
    count = len(ids) // length
    if count < sequences:
        raise ConfigError(
            f"{name}: {len(ids)} tokens are too few for {sequences} sequences of {length}; "
            + (
                f"it holds {count} sequences of that length"
                if count
                else "give more text or shorter sequences"
            )
        )
    chosen = np.sort(np.random.default_rng(seed).choice(count, size=sequences, replace=False))
    windows = np.array(ids[: count * length], np.int32).reshape(count, length)
    return np.ascontiguousarray(windows[chosen])
