"""Nonsense gets an answer below 500, in time, and hurts nobody."""

import copy
import http.client
import json
import random
import socket
import time

import pytest
from raw import connect, exchange, post, read_all, request

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETION = {"prompt": "hi", "max_tokens": 4}
DEEP = b"[" * 100_000 + b"]" * 100_000
SURROGATE = "\ud800"


@pytest.fixture(scope="module")
def short(model):
    """A server whose answers are short whatever is asked, and that waits for nobody."""
    from conftest import Server

    server = Server(
        model, "--max-model-len", "128", "--body-timeout", "1", "--threads", "1",
        "--kv-cache-memory", "16MB",
    ).wait_ready()  # fmt: skip
    yield server
    assert not [line for line in server.lines if "Traceback" in line], server.lines
    assert server.stop() == 0


@pytest.fixture(autouse=True)
def unhurt(short):
    yield
    assert post(short, "/v1/completions", {**COMPLETION, "temperature": 0})[0] == 200
    short.until_idle()


@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        b'{"prompt": ' + DEEP + b"}",
        b'{"messages": [{"role": "user", "content": "x", "more": ' + DEEP + b"}]}",
        b'{"prompt": "x", "structured_outputs": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": '
        + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    ],
    ids=["array", "prompt", "message", "schema", "template"],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_deep_json(short, path, body):
    status, answer = exchange(short, request(path, body))
    assert 200 <= status < 500 and json.loads(answer)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "n", "seed",
                                  "repetition_penalty", "max_tokens", "top_k"])  # fmt: skip
@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400,
                                   "9" * 5000, "true", '"1"', "[]"])  # fmt: skip
def test_numbers_that_are_none(short, name, value):
    body = json.dumps({**CHAT, name: 0}).replace(f'"{name}": 0', f'"{name}": {value}').encode()
    assert value.encode() in body
    status, answer = exchange(short, request("/v1/chat/completions", body))
    assert status == 400 and json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    "field",
    ['"logit_bias": {"1": NaN}', '"stop_token_ids": [NaN]', '"stream_options": NaN',
     '"structured_outputs": {"json": {"type": "number", "minimum": NaN}}',
     '"structured_outputs": {"json": {"type": "string", "maxLength": Infinity}}',
     '"guided_json": NaN'],
)  # fmt: skip
def test_fields_that_are_no_numbers(short, field):
    body = b'{"prompt": "x", ' + field.encode() + b"}"
    status, answer = exchange(short, request("/v1/completions", body))
    assert status == 400 and json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {**COMPLETION, "prompt": SURROGATE}),
        ("/v1/completions", {**COMPLETION, "prompt": ["a", SURROGATE]}),
        ("/v1/completions", {**COMPLETION, "model": SURROGATE}),
        ("/v1/completions", {**COMPLETION, "stop": [SURROGATE]}),
        ("/v1/completions", {**COMPLETION, "logit_bias": {SURROGATE: 1}}),
        ("/v1/completions", {**COMPLETION, "logit_bias": {SURROGATE: "x"}}),
        ("/v1/completions", {**COMPLETION, SURROGATE: SURROGATE}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": SURROGATE, "content": "x"}]}),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": SURROGATE}]}),
        ("/v1/chat/completions", {**CHAT, "messages": [
            {"role": "user", "content": [{"type": "text", "text": SURROGATE}]}]}),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {SURROGATE: SURROGATE}}),
        ("/tokenize", {"prompt": SURROGATE}),
        ("/tokenize", {"messages": [{"role": "user", "content": SURROGATE}]}),
    ],
)  # fmt: skip
def test_surrogates(short, path, body):
    status, answer = post(short, path, body)
    assert status in (200, 400, 404) and answer
    if status != 200:
        assert answer["error"]["message"]


@pytest.mark.parametrize("text", ["x" * 10_000_000, "ä " * 2_500_000], ids=["10 MB", "7.5 MB"])
def test_long_prompts_cost_little(short, text):
    begun = time.monotonic()
    status, _ = exchange(
        short, request("/v1/completions", json.dumps({"prompt": text}, ensure_ascii=False).encode())
    )
    assert status in (400, 413) or status == 0  # closed before all of it was sent
    assert time.monotonic() - begun < 5


LOADS = {
    "text to tokenize": ("/tokenize", {"prompt": "ab " * 1_000_000}, 200),
    "ids to detokenize": ("/detokenize", {"tokens": [7] * 2_500_000}, 200),
    "ids": ("/v1/completions", {"prompt": [7] * 2_500_000}, 400),
    "no ids": ("/v1/completions", {"prompt": [None] * 1_300_000}, 400),
    "prompts": ("/v1/completions", {"prompt": ["a"] * 1_500_000}, 400),
    "messages": ("/v1/chat/completions", {"messages": [{"role": "user"}] * 400_000}, 400),
    "no messages": ("/v1/chat/completions", {"messages": [{}] * 1_500_000}, 400),
    "parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}] * 10**6}]},
              400),
    "biases": ("/v1/completions", {"prompt": "a", "logit_bias": dict.fromkeys(range(500_000), 1.0)},
               400),
    "choices": ("/v1/completions", {"prompt": "a", "guided_choice": ["a"] * 1_000_000}, 400),
    "tools": ("/v1/chat/completions", {**CHAT, "tools": [{}] * 2_000_000}, 400),
}  # fmt: skip


@pytest.mark.parametrize("what", LOADS)
def test_bodies_of_megabytes_cost_little(short, what):
    """8 MB in many small pieces: each is looked at, while everybody waits."""
    path, body, expected = LOADS[what]
    status, answer = exchange(short, request(path, json.dumps(body).encode()), 60)
    assert status == expected, answer[:500]
    assert len(answer) < 1000 or status == 200


def test_others_are_answered_while_a_long_text_is_tokenized(short):
    with connect(short, 120) as sock:
        sock.sendall(request("/tokenize", LOADS["text to tokenize"][1], "connection: close"))
        sock.setblocking(False)
        assert post(short, "/v1/completions", COMPLETION)[0] == 200
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        sock.settimeout(120)
        assert read_all(sock).startswith(b"HTTP/1.1 200")


def test_endless_chunked_body(short):
    with connect(short) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                     b"content-type: application/json\r\n"
                     b"transfer-encoding: chunked\r\n\r\n")  # fmt: skip
        with pytest.raises(OSError):
            for _ in range(1000):
                sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")


def test_body_that_stalls(short):
    with connect(short) as sock:
        sock.sendall(request("/v1/completions", COMPLETION)[:-3])
        begun = time.monotonic()
        data = read_all(sock)
        assert data.startswith(b"HTTP/1.1 408") and time.monotonic() - begun < 4


def test_body_that_trickles(short):
    data = request("/v1/completions", COMPLETION)
    with connect(short) as sock:
        sock.sendall(data[:-20])
        with pytest.raises(OSError):
            for at in range(100):
                sock.sendall(data[-20:][at % 20 : at % 20 + 1] if at < 10 else b"")
                time.sleep(0.2)
                if sock.recv(1000, socket.MSG_DONTWAIT):
                    raise OSError("answered")


def test_chunked_body_that_stalls(short):
    with connect(short) as sock:
        sock.sendall(b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\n"
                     b"content-type: application/json\r\n"
                     b"transfer-encoding: chunked\r\n\r\n5\r\n{\"pro")  # fmt: skip
        assert read_all(sock).startswith(b"HTTP/1.1 408")


def test_many_that_stall_hold_nobody_up(short):
    data = request("/v1/completions", COMPLETION)
    stalled = [connect(short) for _ in range(200)]
    try:
        for number, sock in enumerate(stalled):
            sock.sendall(data[: number % len(data)])
        for _ in range(5):
            assert post(short, "/v1/completions", COMPLETION)[0] == 200
        for sock in stalled:
            assert read_all(sock)[:12] in (b"HTTP/1.1 408", b"")
    finally:
        for sock in stalled:
            sock.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 1.0])
def test_half_closed(short, part, stream):
    """Whoever closes its side for writing is gone (docs/serve.md): no answer has to come."""
    data = request("/v1/completions", {**COMPLETION, "max_tokens": 100, "stream": stream})
    with connect(short) as sock:
        sock.sendall(data[: int(part * len(data))])
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)  # until the server closes


def test_header_that_stalls(short):
    for start in (b"", b"POST /v1/comple", b"GET / HTTP/1.1\r\nhost: localhost\r\nx-"):
        with connect(short) as sock:
            sock.sendall(start)
            begun = time.monotonic()
            assert read_all(sock).startswith(b"HTTP/1.1 408")
            assert time.monotonic() - begun < 4


@pytest.mark.parametrize("one", [True, False])
def test_header_flood(short, one):
    with connect(short) as sock:
        try:
            sock.sendall(b"GET / HTTP/1.1\r\nx: ")
            for number in range(10_000):
                sock.sendall(b"y" * 1000 if one else b"z\r\nx-%d: " % number + b"y" * 1000)
        except OSError:
            pass
        else:
            raise AssertionError("10 MB of headers were taken")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100 + b"\r\n\r\n",
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 500,
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"content-length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
        b"content-length: 5\r\n\r\n0\r\n\r\n",
        b"GET /%00%ff%fe/../../etc/passwd HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"CONNECT example.org:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"expect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
        b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n",
        b"GET /\x7f\xc3\xa4 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx\x00y: \x01\r\n\r\n",
        b"GET / HTTP/1.1\nhost: localhost\n\n",
    ],
)
def test_what_is_no_request(short, data):
    status, _ = exchange(short, data, timeout=5)
    assert status < 500


@pytest.mark.parametrize(
    "body",
    [b"", b"x", b"null", b"[]", b'"x"', b"1", b"{", b'{"prompt": "x"', b"\xff\xfe", b"{}\x00",
     b'{"prompt": "\xff"}', b"a=b&c=d"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize",
                                  "/detokenize"])  # fmt: skip
def test_what_is_no_body(short, path, body):
    status, answer = exchange(short, request(path, body))
    assert status == 400 and json.loads(answer)["error"]["type"]


def test_other_content_types(short):
    data = request("/v1/completions", COMPLETION).replace(b"application/json", b"text/plain")
    assert exchange(short, data)[0] == 415


def test_half_open_then_gone(short):
    for _ in range(50):
        sock = connect(short)
        sock.sendall(request("/v1/completions", {**COMPLETION, "stream": True}))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        sock.close()  # a reset
    short.until_idle()


NASTY = [None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 2**200, 0.5, 1e308, float("nan"), "", "\0",
         SURROGATE, "x" * 5000, "{{ 7*7 }}", [], {}, [[]], [None], {"": {}}, [0], [2**40], ["a"],
         {"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": {"a": [1]}}},
         [{"role": "user", "content": None}], [{"role": "", "content": {}}]]  # fmt: skip
FIELDS = ["model", "messages", "prompt", "max_tokens", "n", "temperature", "top_p", "top_k", "stop",
          "min_p", "seed", "logit_bias", "logprobs", "top_logprobs", "stream", "stream_options",
          "echo", "tools", "tool_choice", "response_format", "presence_penalty", "min_tokens",
          "stop_token_ids", "repetition_penalty", "best_of", "suffix", "chat_template_kwargs",
          "ignore_eos", "user", "tokens", "add_special_tokens", "guided_regex"]  # fmt: skip


VALID = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT,
         "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]}}  # fmt: skip


def test_five_hundred_mutants(short):
    rng = random.Random(0)
    connection = http.client.HTTPConnection("127.0.0.1", short.port, timeout=10)
    seen = set()
    for _ in range(500):
        path = rng.choice(sorted(VALID))
        body = copy.deepcopy(VALID[path])
        for _ in range(rng.randint(1, 3)):
            body[rng.choice(FIELDS)] = rng.choice(NASTY)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        assert answer.status < 500, (path, body, data)
        seen.add(answer.status)
    connection.close()
    assert {200, 400} <= seen
