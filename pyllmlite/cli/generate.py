"""``pyllmlite run`` and ``pyllmlite chat``: text out of a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllmlite.cli.options import ENGINE, SAMPLING, shared
from pyllmlite.cli.output import print_json

if TYPE_CHECKING:
    from pyllmlite.core.request import RequestOutput
    from pyllmlite.engine.llm import LLM

RUN_MAX_TOKENS = 256
CHAT_MAX_TOKENS = 1024
HELP = "/reset forgets what was said, /exit (or Ctrl-D) leaves; Ctrl-C stops an answer"

Messages = list[dict[str, str]]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Alias, hub id or path.", show_default="smollm2-135m"),
]
System = Annotated[
    str | None,
    typer.Option(help="What the model is told before anything else.", show_default=False),
]


def load(model: str | None, engine: dict[str, Any], **more: Any) -> LLM:
    """An ``LLM``; what was set on the command line and nothing else."""
    from pyllmlite.engine.llm import LLM

    return LLM(model=model, **engine, **more)


def sampling_params(sampling: dict[str, Any], max_tokens: int, temperature: float) -> Any:
    """What was set, over the command's own defaults."""
    from pyllmlite.core.sampling import SamplingParams

    return SamplingParams(**{"max_tokens": max_tokens, "temperature": temperature, **sampling})


def _new_text(outputs: Iterator[RequestOutput]) -> Iterator[tuple[str, RequestOutput]]:
    """What each step added to the first completion."""
    shown = 0
    for output in outputs:
        text = output.outputs[0].text
        yield text[shown:], output
        shown = max(shown, len(text))


def _as_json(model: str | None, output: RequestOutput) -> dict[str, Any]:
    first, metrics = output.outputs[0], output.metrics
    seconds = first_token = None
    if metrics is not None and metrics.finished_time is not None:
        seconds = metrics.finished_time - metrics.arrival_time
        if metrics.first_token_time is not None:
            first_token = metrics.first_token_time - metrics.arrival_time
    return {
        "model": model,
        "prompt": output.prompt,
        "text": first.text,
        "token_ids": first.token_ids,
        "finish_reason": first.finish_reason,
        "stop_reason": first.stop_reason,
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(first.token_ids),
            "cached_tokens": output.num_cached_tokens,
        },
        "seconds": seconds,
        "time_to_first_token": first_token,
    }


@shared(sampling=SAMPLING, engine=ENGINE)
def run(
    prompt: Annotated[
        str | None, typer.Argument(help="The text; - or nothing reads it from standard input.")
    ] = None,
    model: Model = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Answer as an assistant, or go on with the text; --chat if the model can.",
            show_default=False,
        ),
    ] = None,
    system: System = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print as it comes (on a terminal)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, when it is complete.")] = False,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Answer one prompt.

    Takes the likeliest token each time, unless a temperature is given.
    """
    from pyllmlite.core.errors import RequestError

    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise RequestError('no prompt: pyllmlite run "What is a cat?"')
        prompt = sys.stdin.read().strip()
    if not prompt:
        raise RequestError("the prompt is empty")
    params = sampling_params(sampling, RUN_MAX_TOKENS, 0.0)
    llm = load(model, engine)
    as_chat = llm.has_chat_template if chat is None else chat
    if system is not None and not as_chat:
        raise RequestError("--system needs a model with a chat template, without --raw")
    asked: Any = prompt
    if as_chat:
        asked = [{"role": "system", "content": system}] if system is not None else []
        asked.append({"role": "user", "content": prompt})
    if json or not (sys.stdout.isatty() if stream is None else stream):
        answer = llm.chat if as_chat else llm.generate
        output = answer(asked, params, use_tqdm=False)[0]
        _check(output)
        if json:
            print_json(_as_json(llm.model, output))
        else:
            print(output.outputs[0].text)
        return
    for text, output in _new_text(llm.stream(asked, params)):
        print(text, end="", flush=True)
        if output.finished:
            print()
            _check(output)


def _check(output: RequestOutput) -> None:
    from pyllmlite.core.errors import StepError

    if output.error:
        raise StepError(output.error)


@shared(sampling=SAMPLING, engine=ENGINE)
def chat(
    model: Model = None,
    system: System = None,
    *,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Talk with a model, line by line; /help says more."""
    from pyllmlite.core.errors import ModelError, PyllmliteError

    params = sampling_params(sampling, CHAT_MAX_TOKENS, 0.2)
    llm = load(model, engine)
    if not llm.has_chat_template:
        raise ModelError(
            f"{llm.model} has no chat template; pyllmlite run --raw goes on with a text"
        )
    interactive = sys.stdin.isatty()
    if interactive:
        _read_history()
        print(f"{llm.model}: {HELP}", file=sys.stderr)
    start: Messages = [{"role": "system", "content": system}] if system is not None else []
    messages = list(start)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if not line:
            continue
        if line in ("/exit", "/quit", "/bye"):
            return
        if line == "/reset":
            messages = list(start)
            continue
        if line.startswith("/"):
            print(HELP if line == "/help" else f"{line.split()[0]} is no command; {HELP}")
            continue
        messages.append({"role": "user", "content": line})
        try:
            answer = _answer(llm, messages, params)
        except PyllmliteError as error:
            messages.pop()
            print(f"error: {error} (/reset starts anew)", file=sys.stderr)
            continue
        messages.append({"role": "assistant", "content": answer})


def _answer(llm: LLM, messages: Messages, params: Any) -> str:
    """Print the answer as it comes; Ctrl-C ends it, and what was said stays in the history."""
    said = ""
    outputs = llm.stream(messages, params)
    try:
        for text, output in _new_text(outputs):
            said += text
            print(text, end="", flush=True)
            if output.finished:
                _check(output)
    except KeyboardInterrupt:
        pass
    finally:
        outputs.close()  # ends the request: its blocks come free
        print()
    return said


def _read_history() -> None:
    """Line editing, and the lines of earlier chats, where the platform has readline."""
    try:
        import atexit
        import readline
    except ImportError:
        return
    from pyllmlite.model.hub import cache_dir

    file = cache_dir() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            readline.read_history_file(file)
    except OSError:
        return
    readline.set_history_length(1000)

    def save() -> None:
        try:
            readline.write_history_file(file)
        except OSError:
            pass  # a history that cannot be kept is no reason to fail at the door

    atexit.register(save)
