"""Batches without a server: every row of a Ray dataset gets an answer."""

from __future__ import annotations

from typing import Any

import ray.data

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import ConfigError, RequestError
from pyllmlite.core.sampling import SamplingParams


class _Answer:
    """One engine of the pool; called with a block of rows (a ``pyarrow.Table``)."""

    def __init__(
        self, prompt: str, output: str, params: SamplingParams, options: dict[str, Any]
    ) -> None:
        from pyllmlite.engine.llm import LLM

        self._prompt = prompt
        self._output = output
        self._params = params
        self._llm = LLM(**options)

    def __call__(self, rows: Any) -> Any:
        import pyarrow as pa

        if self._prompt not in rows.column_names:
            raise ConfigError(
                f"the dataset has no column {self._prompt!r}; it has "
                f"{', '.join(map(repr, rows.column_names))}"
            )
        prompts = [_plain(value) for value in rows.column(self._prompt).to_pylist()]
        answers = self._run(prompts)
        types = {"": pa.string(), "_tokens": pa.int64(), "_finish_reason": pa.string(),
                 "_error": pa.string()}  # fmt: skip
        for at, (suffix, type) in enumerate(types.items()):
            column = pa.array([answer[at] for answer in answers], type)
            rows = rows.append_column(self._output + suffix, column)
        return rows

    def _run(self, prompts: list[Any]) -> list[tuple[Any, ...]]:
        """A prompt that cannot be run is that row's error and no other's."""
        if not prompts:
            return []
        try:
            many: list[Any] = []
            chats: list[Any] = []
            for prompt in prompts:
                (chats if _is_chat(prompt) else many).append(prompt)
            texts = iter(self._llm.generate(many, self._params, use_tqdm=False) if many else ())
            talks = iter(self._llm.chat(chats, self._params, use_tqdm=False) if chats else ())
            outputs = [next(talks if _is_chat(prompt) else texts) for prompt in prompts]
        except RequestError as error:
            if len(prompts) == 1:
                return [(None, 0, "error", str(error))]
            half = len(prompts) // 2  # nothing has run: the bad one is found by halves
            return self._run(prompts[:half]) + self._run(prompts[half:])
        made = []
        for output in outputs:
            first = output.outputs[0]
            made.append((first.text, len(first.token_ids), first.finish_reason, output.error))
        return made


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _plain(value: Any) -> Any:
    """Messages without the fields that only other rows' messages have."""
    if not _is_chat(value):
        return value
    return [{name: part for name, part in message.items() if part is not None} for message in value]


def generate(
    dataset: ray.data.Dataset,
    model: str | None = None,
    *,
    prompt: str = "prompt",
    output: str = "generated",
    sampling_params: SamplingParams | None = None,
    replicas: int = 1,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    batch_size: int = 256,
    **engine_options: Any,
) -> ray.data.Dataset:
    """Answers for all rows of a dataset, by a pool of engines; lazily, as Ray Data does it.

    Args:
        prompt: The column of prompts: text, lists of token ids, or lists of messages (``role``,
            ``content``), which go through the chat template.
        output: The new column of texts; beside it ``..._tokens`` (how many were generated),
            ``..._finish_reason`` and ``..._error`` (null, or why this row has no answer).
        sampling_params: With ``n`` 1.  Rows without a seed draw from the engine's, so what they
            draw depends on how rows are dealt out; with ``temperature=0`` nothing does.
        replicas: Engines, each with ``num_cpus`` threads.
        batch_size: Rows that an engine is given at once; it runs ``max_num_seqs`` of them together.
        engine_options: Fields of :class:`EngineConfig`.
    Raises:
        ConfigError: An option that cannot be, at once; a missing column, when it is run.
    """
    params = sampling_params if sampling_params is not None else SamplingParams()
    if params.n != 1:
        raise ConfigError(f"a row gets one answer: n must be 1, got {params.n}")
    engine_options.setdefault("threads", max(int(num_cpus), 1))
    EngineConfig.from_kwargs(model=model, **engine_options)
    return dataset.map_batches(
        _Answer,
        fn_constructor_args=(prompt, output, params, {"model": model, **engine_options}),
        compute=ray.data.ActorPoolStrategy(size=replicas),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        zero_copy_batch=True,
    )
