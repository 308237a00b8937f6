"""``LLM``: a model in this process, prompts in, texts out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pyllmlite.core.beam import BeamSearchOutput, BeamSearchParams
from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import ModelError, RequestError
from pyllmlite.core.request import RequestOutput
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.engine import Engine
from pyllmlite.engine.interrupt import DeferredInterrupt
from pyllmlite.engine.outputs import request_output
from pyllmlite.engine.progress import Progress
from pyllmlite.engine.prompts import Prompt, is_single
from pyllmlite.engine.state import RequestState

Messages = Sequence[Mapping[str, Any]]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model and an engine.

    Args:
        model: Path of a checkpoint, alias or hub id; None: the default model.
        options: Fields of :class:`~pyllmlite.core.config.EngineConfig`.
    Raises:
        ModelError, PluginError, ConfigError, CapacityError: at once, in one line.

    It may be used from several threads; their requests then share its steps.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        from pyllmlite.model.build import build

        config = EngineConfig.from_kwargs(model=model, **options)
        self._take(build(config.model, config))

    @classmethod
    def from_built(cls, built: Any) -> LLM:
        """Around a model that is built already."""
        llm = cls.__new__(cls)
        llm._take(built)
        return llm

    def _take(self, built: Any) -> None:
        self.built = built
        self.engine = Engine(built)
        self._lock = threading.RLock()
        self._at_the_door: set[int] = set()  # threads that want to add or end requests
        self._count = 0
        self._receivers: dict[str, Callable[[RequestState], None]] = {}

    # -- what it is ----------------------------------------------------------------------------
    @property
    def model(self) -> str:
        """The name it was asked for, or the default model's."""
        return self.built.config.model or "smollm2-135m"

    @property
    def llm_engine(self) -> Engine:
        return self.engine

    def get_tokenizer(self) -> Any:
        if self.built.tokenizer is None:
            raise ModelError("the model was loaded without a tokenizer")
        return self.built.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``generate`` takes if it is given none."""
        return SamplingParams()

    @property
    def has_chat_template(self) -> bool:
        return bool(getattr(self.built.tokenizer, "chat_template", None))

    def explain(self) -> str:
        """What was selected for each hook, why, and why the others were not."""
        return self.built.explain()

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes that no running request holds."""
        with self._door():
            self.built.cache.reset_prefix_cache()

    # -- generate ------------------------------------------------------------------------------
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        priority: int | Sequence[int] | None = None,
        client: str = "",
    ) -> list[RequestOutput]:
        """Complete prompts; outputs are in their order.

        Args:
            prompts: One or many of: text, token ids, ``{"prompt": text}``,
                ``{"prompt_token_ids": ids}``.
            sampling_params: For all, or one for each prompt.
            use_tqdm: Show a progress bar.
            priority: Smaller runs earlier; for all, or one for each.
        Returns:
            A request that failed while it ran has ``finish_reason`` ``error`` and says why in
            ``error``; the others are not touched by it.
        Raises:
            RequestError: A prompt or its parameters cannot work; then none has run.
        """
        many = [prompts] if is_single(prompts) else list(prompts)  # type: ignore[arg-type]
        params = _one_each("sampling_params", sampling_params, SamplingParams(), len(many))
        priorities = _one_each("priority", priority, 0, len(many))
        states = self._prepare(many, params, priorities, client)
        return self._run(states, use_tqdm)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, use_tqdm: bool = False
    ) -> list[BeamSearchOutput]:
        """The ``beam_width`` most probable continuations that beam search finds, best first.

        Raises:
            RequestError: As :meth:`generate`, and if one of the searches failed.
        """
        found = []
        for output in self.generate(prompts, params.sampling_params(), use_tqdm):
            if output.error is not None:
                raise RequestError(output.error)
            found.append(BeamSearchOutput.of(output, params.length_penalty))
        return found

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many; a message is ``{"role": ..., "content": ...}``."""
        many = [messages] if _is_conversation(messages) else list(messages)
        options = dict(chat_template_kwargs or {})
        options["add_generation_prompt"] = add_generation_prompt
        if chat_template is not None:
            options["chat_template"] = chat_template
        if tools is not None:
            options["tools"] = tools
        prompts = [self._chat_prompt(conversation, options) for conversation in many]
        return self.generate(prompts, sampling_params, use_tqdm, priority=priority)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> Generator[RequestOutput, None, None]:
        """One prompt, or one conversation, as it grows: each output holds all that came so far.

        Text that may be the beginning of a stop string is held back.  Closing the iterator ends
        the request.
        """
        if _is_conversation(prompt):
            prompt = self._chat_prompt(prompt, {"add_generation_prompt": True})
        params = sampling_params if sampling_params is not None else SamplingParams()
        (state,) = self._prepare([prompt], [params], [priority], "", stream=True)
        return self._stream(state)

    def _stream(self, state: RequestState) -> Generator[RequestOutput, None, None]:
        request_id = state.request.id
        arrived: deque[RequestOutput] = deque()
        self._submit([state], lambda s: arrived.append(request_output(s)))
        try:
            while True:
                while arrived:
                    output = arrived.popleft()
                    yield output
                    if output.finished:
                        return
                with DeferredInterrupt():
                    self._step()
        finally:
            self._end([request_id])

    # -- inside --------------------------------------------------------------------------------
    @contextmanager
    def _door(self) -> Iterator[None]:
        """The lock, for those who do not step."""
        me = threading.get_ident()
        self._at_the_door.add(me)
        try:
            with self._lock:
                self._at_the_door.discard(me)
                yield
        finally:
            self._at_the_door.discard(me)

    def _chat_prompt(self, messages: Any, options: dict[str, Any]) -> Prompt:
        if not _is_conversation(messages):
            raise RequestError('messages are a list of {"role": ..., "content": ...}')
        tokenizer = self.get_tokenizer()
        text = tokenizer.apply_chat_template(list(messages), **options)
        # The template has written BOS where the model wants it; a second one is not wanted.
        return {
            "prompt": text,
            "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False),
        }

    def _prepare(
        self,
        prompts: Sequence[Any],
        params: Sequence[SamplingParams],
        priorities: Sequence[int],
        client: str,
        stream: bool = False,
    ) -> list[RequestState]:
        """All of them, or none."""
        states: list[RequestState] = []
        with self._door():
            try:
                for prompt, param, priority in zip(prompts, params, priorities, strict=True):
                    self._count += 1
                    name = str(self._count - 1)
                    states.append(
                        self.engine.prepare(name, prompt, param, priority, client, stream)
                    )
            except BaseException:
                for state in states:
                    self.engine.discard(state)
                raise
        return states

    def _submit(self, states: list[RequestState], receive: Callable[[RequestState], None]) -> None:
        with self._door():
            for state in states:
                self._receivers[state.request.id] = receive
                self.engine.submit(state)

    def _run(
        self, states: list[RequestState], use_tqdm: bool | Callable[..., Any]
    ) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        progress = Progress(len(states), use_tqdm)

        def receive(state: RequestState) -> None:
            output = outputs[state.request.id] = request_output(state)
            progress.finished(
                len(output.prompt_token_ids), sum(len(c.token_ids) for c in output.outputs)
            )

        try:
            with DeferredInterrupt() as interrupt:
                self._submit(states, receive)
                while len(outputs) < len(states):
                    self._step()
                    interrupt.check()
        finally:
            progress.close()
            self._end([state.request.id for state in states])
        return [outputs[state.request.id] for state in states]

    def _step(self) -> None:
        with self._lock:
            for state in self.engine.step():
                receive = self._receivers.get(state.request.id)
                if receive is not None:
                    receive(state)
            wait = self.engine.wait_seconds()
        if self._at_the_door:  # whoever steps would take the lock again before they wake up
            time.sleep(1e-5)
        if wait > 0:  # a scheduler's time window; somebody else's request may end it
            time.sleep(min(wait, 0.01))

    def _end(self, request_ids: list[str]) -> None:
        """Nobody waits for these any more."""
        with self._door():
            for request_id in request_ids:
                self._receivers.pop(request_id, None)
                self.engine.abort(request_id)


def _one_each(name: str, value: Any, default: Any, count: int) -> list[Any]:
    if value is None:
        return [default] * count
    if isinstance(value, Sequence):
        if len(value) != count:
            raise RequestError(f"there are {len(value)} {name} for {count} prompts")
        return list(value)
    return [value] * count


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, Sequence)
        and not isinstance(messages, (str, bytes))
        and len(messages) > 0
        and isinstance(messages[0], Mapping)
        and "role" in messages[0]
    )
