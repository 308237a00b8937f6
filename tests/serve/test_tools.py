"""Calls are found in text that is cut anywhere, and nothing else is lost."""

import json

import pytest

from pyllmlite.serve.errors import ApiError
from pyllmlite.serve.protocol import ChatRequest
from pyllmlite.serve.tools import ToolParser, forced_call, wanted_tools

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<x>"}}\n</tool_call>'


def parse(text, size):
    parser = ToolParser()
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    shown, calls = "", []
    for piece in pieces:
        more, found = parser.feed(piece, last=False)
        shown, calls = shown + more, calls + found
    more, found = parser.feed("", last=True)
    return shown + more, [
        (c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls + found
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "count"),
    [
        ("Hello <b> {x}", "Hello <b> {x}", 0),
        (CALL, "", 1),
        (CALL + "\n" + CALL, "", 2),
        ("I add. " + CALL, "I add. ", 1),
        (CALL.removesuffix("</tool_call>"), "", 1),
        ('{"name": "add", "parameters": {"a": 1, "b": "<x>"}}', "", 1),
        ('{"name": 3}', '{"name": 3}', 0),
        ("<tool_call>nonsense</tool_call>!", "<tool_call>nonsense</tool_call>!", 0),
        ("a <tool_ca", "a <tool_ca", 0),
        ("", "", 0),
    ],
)
def test_parse(text, shown, count, size):
    assert parse(text, size) == (shown, [("add", {"a": 1, "b": "<x>"})] * count)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def body(**fields):
    return ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], **fields}
    )


def test_choice():
    assert wanted_tools(body())[0]["function"]["name"] == "add"
    assert wanted_tools(body(tool_choice="none")) is None
    assert wanted_tools(body(tools=None)) is None
    with pytest.raises(ApiError, match="needs tools"):
        wanted_tools(body(tools=None, tool_choice="required"))


def test_forced_call():
    for choice in (None, "auto", "none"):
        assert forced_call(body(tool_choice=choice)) is None
    named = {"type": "function", "function": {"name": "add"}}
    schema = forced_call(body(tool_choice=named))
    assert schema == forced_call(body(tool_choice="required"))
    assert schema["properties"]["name"] == {"const": "add"}
    both = body(tools=[TOOL, {"type": "function", "function": {"name": "other"}}])
    both.tool_choice = "required"
    names = [s["properties"]["name"]["const"] for s in forced_call(both)["anyOf"]]
    assert names == ["add", "other"]
    both.tool_choice = named
    assert forced_call(both) == schema
    for choice in ("sometimes", {}, {"function": 3}, {"function": {"name": "nobody"}}):
        with pytest.raises(ApiError, match="tool_choice"):
            forced_call(body(tool_choice=choice))


def test_forced_call_needs_an_engine_that_can(monkeypatch):
    from pyllmlite.serve import params

    monkeypatch.setattr(params, "_FIELDS", set())
    with pytest.raises(ApiError, match="not supported"):
        params.chat_params(body(tool_choice="required"))


def test_lone_surrogates_in_arguments():
    parser = ToolParser()
    text = '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}</tool_call>'
    _, calls = parser.feed(text, last=True)
    arguments = calls[0]["function"]["arguments"]
    assert arguments.encode() and json.loads(arguments) == {"a": "\ud800"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [('{"a": 1}', {"a": 1}), ("{a", "{a"), ("[" * 100_000, "[" * 100_000), ({"a": 1}, {"a": 1})],
    ids=["string", "damaged", "deep", "object"],
)
def test_arguments_reach_the_template_as_an_object(given, wanted):
    from pyllmlite.serve.protocol import Message
    from pyllmlite.serve.text import _plain

    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
    message = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    (made,) = _plain(message)["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": wanted} and made["id"] == "1"
    assert call["function"]["arguments"] == given  # what came in is as it was


@pytest.mark.parametrize("calls", [None, "x", [None], [{}], [{"function": 1}]])
def test_tool_calls_that_are_none(calls):
    from pyllmlite.serve.protocol import Message
    from pyllmlite.serve.text import _plain

    message = Message.model_validate({"role": "assistant", "content": "x", "tool_calls": calls})
    assert _plain(message)["tool_calls"] == calls


def nested(depth):
    made = {}
    for _ in range(depth):
        made = {"a": made}
    return made


@pytest.mark.parametrize(
    "fields",
    [{"guided_regex": "a" * 70_000}, {"guided_choice": ["ab"] * 20_000},
     {"structured_outputs": {"json": nested(100_000)}},
     {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": "y" * 70_000}}}],
      "tool_choice": "required"}],
    ids=["regex", "choice", "deep", "tool"],
)  # fmt: skip
def test_constraints_that_are_too_large(fields):
    from pyllmlite.serve.params import chat_params

    made = body()
    for name, value in fields.items():
        setattr(made, name, body(tools=value).tools if name == "tools" else value)
    with pytest.raises(ApiError, match="at most 65536|too deeply") as caught:
        chat_params(made)
    assert caught.value.status == 400
