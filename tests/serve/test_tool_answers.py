"""Tools through the whole API: the template is told of them, calls come out of the text."""

import dataclasses
import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from text_model import write_text_model

from pyllmlite import SamplingParams
from pyllmlite.serve.chat import ChatWriter

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
HEAD = {"id": "x", "created": 1, "model": "m"}
TEXT = 'Well. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


class Written:
    """A generation whose text is known: a delta for each piece."""

    def __init__(self, pieces, n=1):
        self.params = SamplingParams(n=n)
        self.prompts = [[1, 2]]
        self._pieces = pieces

    async def items(self):
        for number, piece in enumerate(self._pieces):
            last = number == len(self._pieces) - 1
            reason = "stop" if last else None
            deltas = [[i, piece, 1, None, reason, None] for i in range(self.params.n)]
            yield 0, deltas, {"error": None, "cached": 0} if last else None


def pieces(size):
    return [TEXT[at : at + size] for at in range(0, len(TEXT), size)]


async def test_whole():
    body = await ChatWriter(HEAD, Written(pieces(7), n=2), tools=True).whole()
    answer = ChatCompletion.model_validate(body)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Well. "
        (call,) = choice.message.tool_calls
        assert call.function.name == "add" and json.loads(call.function.arguments) == {"a": 1}
    plain = await ChatWriter(HEAD, Written(pieces(7)), tools=False).whole()
    assert plain["choices"][0]["message"]["content"] == TEXT
    assert plain["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_stream(size):
    writer = ChatWriter(HEAD, Written(pieces(size)), tools=True)
    data = b"".join([event async for event in writer.events(include_usage=True)])
    lines = [line[6:] for line in data.decode().split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(line) for line in lines]
    choices = [c.choices[0] for c in chunks if c.choices]
    assert "".join(c.delta.content or "" for c in choices) == "Well. "
    (call,) = [call for c in choices for call in c.delta.tool_calls or ()]
    assert call.index == 0 and call.id and call.function.name == "add"
    assert choices[-1].finish_reason == "tool_calls"
    assert chunks[-1].usage.completion_tokens == len(pieces(size))


def test_template_is_told(tmp_path, start):
    path = write_text_model(tmp_path / "with-tools")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    server = start(at=str(path))
    import openai

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0, timeout=20)

    def ask(**options):
        return client.chat.completions.create(
            model="with-tools", messages=[{"role": "user", "content": "1+1"}], max_tokens=3,
            temperature=0, **options,
        )  # fmt: skip

    without = ask().usage.prompt_tokens
    told = ask(tools=[TOOL])
    assert told.usage.prompt_tokens == without + len(json.dumps(TOOL)) + 1
    assert told.choices[0].message.tool_calls is None
    assert ask(tools=[TOOL], tool_choice="none").usage.prompt_tokens == without
    if "structured_outputs" in {field.name for field in dataclasses.fields(SamplingParams)}:
        return
    with pytest.raises(openai.BadRequestError, match="not supported"):
        ask(tools=[TOOL], tool_choice="required")
