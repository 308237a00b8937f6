"""The engine's loop behind a socket: what it sends, and that one request's failure is its own."""

import socket
import threading
import time

import pytest

from pyllmlite import SamplingParams
from pyllmlite.core.config import EngineConfig
from pyllmlite.engine.engine import Engine
from pyllmlite.model.build import build
from pyllmlite.serve.wire import Unpacker, pack
from pyllmlite.serve.worker import Worker, params_from_wire, params_to_wire

GREEDY = {"temperature": 0, "max_tokens": 30, "ignore_eos": True}


class Spoken:
    """A worker in a thread, and this end of its socket."""

    def __init__(self, model):
        config = EngineConfig(model=model, threads=1, kv_cache_memory="64MB")
        self.engine = Engine(build(model, config))
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(10)
        self._unpacker = Unpacker()
        worker = Worker(theirs, self.engine, Unpacker())
        self._thread = threading.Thread(target=worker.run, args=([],), daemon=True)
        self._thread.start()
        self.messages = []
        self._read = 0

    def say(self, *commands):
        self.sock.sendall(b"".join(map(pack, commands)))

    def until(self, condition):
        """Read messages until one satisfies ``condition``; it is returned."""
        while True:
            while self._read < len(self.messages):
                self._read += 1
                if condition(self.messages[self._read - 1]):
                    return self.messages[self._read - 1]
            self.messages += self._unpacker.feed(self.sock.recv(1 << 20))

    def answer(self, id):
        """(texts by completion, the end)."""
        texts, seen = {}, 0
        while True:
            for message in self.messages[seen:]:
                for found, deltas, end in message.get("out", ()):
                    if found != id:
                        continue
                    for index, text, *_ in deltas:
                        texts[index] = texts.get(index, "") + text
                    if end is not None:
                        return texts, end
            seen = len(self.messages)
            self.until(lambda message: "out" in message)

    def close(self):
        self.sock.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        for id in list(self.engine.requests):
            self.engine.abort(id)
        self.engine.check_integrity()


@pytest.fixture
def spoken(model):
    made = Spoken(model)
    yield made
    made.close()


@pytest.mark.parametrize("stream", [True, False])
def test_one_message_a_step(spoken, llm, stream):
    prompts = [[5, 6, 7], [8, 9], [10]]
    spoken.say(*[["add", str(i), p, GREEDY, "", stream] for i, p in enumerate(prompts)])
    expected = llm.generate(prompts, SamplingParams(**GREEDY), use_tqdm=False)
    for i, output in enumerate(expected):
        texts, end = spoken.answer(str(i))
        assert texts == {0: output.outputs[0].text} and end["error"] is None
    steps = [m for m in spoken.messages if "out" in m]
    assert len(steps) <= 34  # 30 steps, and a little for those that began later
    if not stream:
        assert sum(len(m["out"]) for m in steps) == 3


def test_abort_frees_within_a_step(spoken):
    spoken.say(["add", "a", [1, 2, 3], {**GREEDY, "max_tokens": 30000}, "", True])
    spoken.until(lambda m: m.get("out"))
    assert spoken.engine.built.cache.num_free_blocks < spoken.engine.built.cache.num_blocks
    sent = spoken.engine.num_steps
    spoken.say(["abort", "a"])
    last = spoken.until(lambda m: m["t"] == "step" and not m["stats"]["running"])
    assert last["stats"]["num_free_blocks"] == last["stats"]["num_blocks"]
    # The step in flight, and those that ran before the command was written.
    assert last["stats"]["steps"] - sent < 50
    spoken.say(["abort", "a"], ["abort", "nobody"], ["add", "b", [1], GREEDY, "", True])
    assert spoken.answer("b")[1]["error"] is None


def test_refused(spoken):
    spoken.say(
        ["add", "a", [], {}, "", True],
        ["add", "b", [10**6], {}, "", True],
        ["add", "c", [1], {"temperature": -1}, "", True],
        ["add", "d", [1], {"no such field": 1}, "", True],
        ["add", "e", [1], GREEDY, "", False],
    )
    message = spoken.until(lambda m: "refused" in m)
    assert [id for id, _ in message["refused"]] == ["a", "b", "c", "d"]
    assert message["accepted"] == ["e"]
    assert spoken.answer("e")[1]["error"] is None


def test_failing_step_ends_its_requests_only(spoken, monkeypatch):
    run = spoken.engine.program.run
    monkeypatch.setattr(spoken.engine, "program", Raises(run))
    spoken.say(["add", "a", [1, 2], GREEDY, "", True])
    assert "on purpose" in spoken.answer("a")[1]["error"]
    spoken.say(["add", "b", [1, 2], GREEDY, "", True])
    assert spoken.answer("b")[1]["error"] is None


class Raises:
    """A program that fails in its third step."""

    def __init__(self, run):
        self._run, self._count = run, 0

    def run(self, batch):
        self._count += 1
        if self._count == 3:
            raise ValueError("on purpose")
        self._run(batch)


def test_snapshot(spoken):
    spoken.say(["add", "a", list(range(200)), {**GREEDY, "max_tokens": 30000}, "", True])
    spoken.until(lambda m: m.get("out"))
    spoken.say(["snapshot", 7])
    found = spoken.until(lambda m: m["t"] == "snapshot")
    assert found["id"] == 7 and len(found["cells"]) <= 1024 and max(found["cells"]) > 0
    spoken.say(["abort", "a"], ["snapshot", 8])
    found = spoken.until(lambda m: m["t"] == "snapshot")
    assert max(found["cells"]) == 0


def test_idle_costs_nothing(spoken):
    spoken.say(["add", "a", [1], GREEDY, "", True])
    spoken.answer("a")
    before, count = time.process_time(), len(spoken.messages)
    time.sleep(0.3)
    assert time.process_time() - before < 0.15
    spoken.say(["snapshot", 1])
    spoken.until(lambda m: m["t"] == "snapshot")
    assert len(spoken.messages) - count <= 2


def test_params_survive():
    for params in (
        SamplingParams(),
        SamplingParams(
            n=2, temperature=0.5, logit_bias={3: -1.5, 40: 2}, stop=["a", "b"], seed=-5,
            logprobs=0, max_tokens=None, stop_token_ids=[1], min_tokens=3, ignore_eos=True,
        ),
    ):  # fmt: skip
        (wire,) = Unpacker().feed(pack(params_to_wire(params)))
        assert params_from_wire(wire) == params


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_too_long_to_be_sent_is_that_requests_failure(spoken, llm, monkeypatch, stream):
    monkeypatch.setattr("pyllmlite.serve.wire.MAX_MESSAGE", 2000)
    long = {**GREEDY, "logprobs": 15 if stream else 3}
    spoken.say(
        ["add", "long", [5, 6, 7], long, "", stream], ["add", "short", [8, 9], GREEDY, "", stream]
    )
    texts, end = spoken.answer("long")
    assert "cannot be sent" in end["error"] and not texts
    texts, end = spoken.answer("short")
    (wanted,) = llm.generate({"prompt_token_ids": [8, 9]}, SamplingParams(**GREEDY))
    assert texts[0] == wanted.outputs[0].text and end["error"] is None
    accepted = [id for message in spoken.messages for id in message.get("accepted", ())]
    assert accepted == ["long", "short"]
    assert not spoken.engine.requests
