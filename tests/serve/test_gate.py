"""Bodies count from their first byte to their request's end; others' names are refused."""

import asyncio

import pytest

from pyllmlite.serve import gate
from pyllmlite.serve.gate import Gate
from pyllmlite.serve.settings import ServeConfig


class Call:
    """One request through a gate; its body is fed by hand."""

    def __init__(self, gate, **headers):
        self.sent = []
        self.messages = asyncio.Queue()
        scope = {"type": "http", "method": "POST", "path": "/x", "client": ("a", 1),
                 "headers": [(b"content-type", b"application/json"),
                             *((k.encode(), v) for k, v in headers.items())]}  # fmt: skip
        self.task = asyncio.ensure_future(gate(scope, self.messages.get, self._send))

    async def _send(self, message):
        self.sent.append(message)

    async def feed(self, body, more=True):
        self.messages.put_nowait({"type": "http.request", "body": body, "more_body": more})
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def status(self):
        return self.sent[0]["status"]


def make(config=None, seen=None):
    async def app(scope, receive, send):
        seen.append((await receive())["body"])

    return Gate(app, config or ServeConfig(), lambda status: None)


def test_bodies_count_while_they_arrive(monkeypatch):
    monkeypatch.setattr(gate, "_ALL_BODIES", 10)

    async def main():
        seen = []
        made = make(seen=seen)
        one, two = Call(made), Call(made)
        await one.feed(b"123456")
        assert made._held == 6
        await two.feed(b"12345")  # eleven bytes, of which none is a whole request's
        await two.task
        assert two.status == 503 and made._held == 6
        await one.feed(b"7890", more=False)
        await one.task
        assert seen == [b"1234567890"] and made._held == 0

    asyncio.run(main())


@pytest.mark.parametrize("how", ["left", "slow", "cancelled", "long"])
def test_bodies_that_do_not_arrive_are_given_back(how):
    async def main():
        made = make(ServeConfig(body_timeout=0.05, max_body=1024))
        call = Call(made)
        await call.feed(b"x" * 1000)
        assert made._held == 1000
        if how == "left":
            call.messages.put_nowait({"type": "http.disconnect"})
        elif how == "cancelled":
            call.task.cancel()
        elif how == "long":
            await call.feed(b"x" * 100)
        await asyncio.wait([call.task], timeout=5)
        assert call.task.done() and made._held == 0
        if how != "cancelled":
            assert call.status == {"left": 499, "slow": 408, "long": 413}[how]

    asyncio.run(main())


def status_of(config, *hosts):
    """What a gate says to a request with these Host headers; 200: it lets it pass."""
    sent = []

    async def app(scope, receive, send):
        await send({"status": 200})

    async def send(message):
        sent.append(message)

    headers = [(b"host", host.encode("latin-1")) for host in hosts]
    scope = {"type": "http", "method": "GET", "path": "/stats", "client": None, "headers": headers}
    asyncio.run(Gate(app, config, lambda status: None)(scope, None, send))
    return sent[0]["status"]


OWN = ["", "localhost", "LocalHost:8000", "127.0.0.1:8000", "192.168.1.2", "[::1]:8000", "[::1]"]
OTHER = ["evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "[evil]", "\xff", "x"]


def test_other_names_are_refused_without_keys_on_this_machine():
    for host in ("127.0.0.1", "localhost", "::1"):
        config = ServeConfig(host=host)
        assert status_of(config) == 200
        assert {status_of(config, name) for name in OWN} == {200}
        assert {status_of(config, name) for name in OTHER} == {403}
        assert status_of(config, "localhost", "evil.example") == 403


def test_names_do_not_matter_elsewhere():
    assert status_of(ServeConfig(host="0.0.0.0"), "evil.example") == 200
    assert status_of(ServeConfig(api_keys=("k",)), "evil.example") == 401  # for the key alone
