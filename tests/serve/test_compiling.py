"""A constraint that compiles slowly holds up nobody but its own request."""

import threading
import time

import pytest
from test_worker import GREEDY, Spoken

from pyllmlite import SamplingParams
from pyllmlite.core.errors import RequestError
from pyllmlite.engine.compiling import Compiler
from pyllmlite.hooks.decoder import Constraint

pytest.importorskip("fastapi")


class Slow(Constraint):
    """Compiles while ``gate`` is closed; allows all."""

    name = "slow"

    def __init__(self, context=None):
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)
        self.compiled = []

    @classmethod
    def applies(cls, params):
        return "slow" in params.extra_args

    def compile(self, params):
        self.begun.release()
        assert self.gate.wait(30)
        if params.extra_args["slow"] == "wrong":
            raise RequestError("the grammar is wrong")
        if params.extra_args["slow"] == "broken":
            raise KeyError("x")
        self.compiled.append(params.extra_args["slow"])

    def open(self, seq):
        assert seq.request.params.extra_args["slow"] in self.compiled
        return None

    def mask(self, state):
        return None

    def accept(self, state, token_id):
        pass

    def rollback(self, state, num_tokens):
        pass

    def fork(self, state):
        return None


class Quick(Slow):
    """Has nothing to compile."""

    compile = Constraint.compile


def asking(what):
    return SamplingParams(extra_args={"slow": what})


def until_taken(compiler, count):
    found = []
    end = time.monotonic() + 10
    while len(found) < count:
        found += compiler.take()
        assert time.monotonic() < end
        time.sleep(0.001)
    return dict(found)


def test_what_is_done_is_taken_once():
    slow, notes = Slow(), []
    slow.gate.set()
    compiler = Compiler([slow], lambda: notes.append(1))
    assert compiler.wants(asking("a")) and not compiler.wants(SamplingParams())
    assert not Compiler([Quick()], print).wants(asking("a"))
    assert compiler.take() == [] and compiler.wait_seconds() is None
    for what in ("a", "wrong", "broken", "b"):
        compiler.submit(what, asking(what))
    found = until_taken(compiler, 4)
    assert found["a"] is None and found["b"] is None
    assert str(found["wrong"]) == "the grammar is wrong"
    assert isinstance(found["broken"], RequestError) and "KeyError" in str(found["broken"])
    assert len(notes) == 8 and compiler.take() == [] and compiler.wait_seconds() is None


def test_time_is_limited_even_if_all_threads_hang():
    slow = Slow()
    compiler = Compiler([slow], lambda: None, timeout=0.05)
    for number in range(5):
        compiler.submit(str(number), asking("a"))
    found = until_taken(compiler, 5)  # in threads that take the place of those that hang
    assert all("not compiled within 0.05 s" in str(error) for error in found.values())
    slow.gate.set()  # what comes of them later is nobody's
    slow.begun.acquire(timeout=10)
    time.sleep(0.05)
    assert compiler.take() == []


def test_what_never_has_its_turn_is_told_so(monkeypatch):
    monkeypatch.setattr("pyllmlite.engine.compiling.MOST_THREADS", 2)
    slow = Slow()
    compiler = Compiler([slow], lambda: None, timeout=0.05)
    for number in range(3):
        compiler.submit(str(number), asking("a"))
    found = until_taken(compiler, 3)
    assert sum("not compiled within" in str(error) for error in found.values()) == 2
    assert sum("try again later" in str(error) for error in found.values()) == 1
    slow.gate.set()


def test_what_nobody_waits_for_is_not_compiled():
    slow = Slow()
    compiler = Compiler([slow], lambda: None)
    for number in range(4):
        compiler.submit(str(number), asking(str(number)))
    for _ in range(2):  # both threads are at work
        assert slow.begun.acquire(timeout=10)
    assert compiler.cancel("3") and not compiler.cancel("3")
    slow.gate.set()
    assert set(until_taken(compiler, 3)) == {"0", "1", "2"}
    assert sorted(slow.compiled) == ["0", "1", "2"]


@pytest.fixture
def spoken(model, monkeypatch):
    slow = Slow()
    from pyllmlite.serve import worker

    init = worker.Worker.__init__

    def with_slow(self, sock, engine, unpacker):
        engine.built.constraints.append(slow)
        init(self, sock, engine, unpacker)

    monkeypatch.setattr(worker.Worker, "__init__", with_slow)
    made = Spoken(model)
    made.slow = slow
    yield made
    slow.gate.set()
    made.close()


def slow_request(id, what):
    return ["add", id, [1, 2], {**GREEDY, "extra_args": {"slow": what}}, "", True]


def test_others_run_meanwhile(spoken):
    spoken.say(slow_request("slow", "a"))
    assert spoken.slow.begun.acquire(timeout=10)
    spoken.say(["add", "quick", [1, 2], GREEDY, "", True])
    texts, end = spoken.answer("quick")
    assert end["error"] is None and not spoken.slow.compiled
    assert not any("slow" in m.get("accepted", ()) for m in spoken.messages)
    spoken.slow.gate.set()  # the engine is idle, and waits for commands
    assert spoken.answer("slow")[0] == texts


def test_what_does_not_compile_is_refused(spoken):
    spoken.slow.gate.set()
    spoken.say(slow_request("a", "wrong"))
    message = spoken.until(lambda m: m.get("refused"))
    assert message["refused"] == [["a", "the grammar is wrong"]]


def test_leaving_while_it_compiles(spoken):
    spoken.say(slow_request("a", "a"))
    assert spoken.slow.begun.acquire(timeout=10)
    spoken.say(["abort", "a"], ["add", "b", [1, 2], GREEDY, "", True])
    spoken.answer("b")
    spoken.slow.gate.set()
    spoken.say(["add", "c", [1, 2], GREEDY, "", True])
    spoken.answer("c")
    assert not any("a" in m.get("accepted", ()) for m in spoken.messages)
