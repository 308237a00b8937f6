"""A plugin that raises at random, clients that are killed, the end under load."""

import json
import os
import random
import signal
import subprocess
import sys
import threading

from raw import connect, post, read_all, request

# A proposer that often raises for prompts whose first token is even, and a decoder's other hooks.
FLAKY = '''
import random
from pyllmlite import hookimpl
from pyllmlite.hooks.decoder import Proposer

class Flaky(Proposer):
    name = "flaky"
    priority = -1
    rng = random.Random(0)

    def chance(self, seq):
        if seq.token_ids[0] % 2 == 0 and self.rng.random() < 0.05:
            raise self.rng.choice([ValueError, KeyError, RuntimeError, AssertionError])("at random")

    def open(self, seq):
        self.chance(seq)

    def propose(self, seq, max_tokens):
        self.chance(seq)
        return [seq.token_ids[-1]] * min(max_tokens, 2)

    def verified(self, seq, num_proposed, num_accepted):
        self.chance(seq)

@hookimpl
def pyllmlite_decoders():
    return [Flaky]
'''

# Clients that ask, read a little, and are there until they are killed.
CLIENT = """
import http.client, json, os, sys, threading
def ask(n):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
    body = {"prompt": [n], "max_tokens": 30000, "ignore_eos": True, "stream": n % 2 == 0}
    connection.request("POST", "/v1/completions", json.dumps(body),
                       {"content-type": "application/json"})
    os.write(1, b"asked\\n")
    answer = connection.getresponse()
    while answer.read(100):
        pass
for n in range(8):
    threading.Thread(target=ask, args=(n,)).start()
"""


def write_plugin(folder):
    """As an installed distribution: what ``importlib.metadata`` finds on the path."""
    (folder / "flaky_plugin.py").write_text(FLAKY)
    info = folder / "flaky_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flaky-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pyllmlite]\nflaky = flaky_plugin\n")


def test_a_plugin_that_raises_at_random_fails_its_own_requests(start, server, tmp_path):
    write_plugin(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    flaky = start("--proposer", "flaky", env={"PYTHONPATH": path})
    rng = random.Random(1)
    bodies = [{"prompt": [n % 200, *(rng.randrange(200) for _ in range(5))], "max_tokens": 20,
               "seed": n, "ignore_eos": True} for n in range(120)]  # fmt: skip
    answers = [None] * len(bodies)

    def ask(share):
        for number in range(share, len(bodies), 12):
            answers[number] = post(flaky, "/v1/completions", bodies[number], 30)

    threads = [threading.Thread(target=ask, args=(share,)) for share in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    failed = 0
    for body, (status, answer) in zip(bodies, answers, strict=True):
        if status == 200:
            plain = post(server, "/v1/completions", body, 30)[1]
            assert answer["choices"] == plain["choices"]
        else:
            assert body["prompt"][0] % 2 == 0 and status in (400, 500)
            assert "proposer 'flaky' failed" in answer["error"]["message"]
            failed += 1
    assert 10 < failed <= 60
    flaky.until_idle()
    assert flaky.stop() == 0


def test_clients_that_are_killed_are_gone(server):
    expected = post(server, "/v1/completions", {"prompt": "x", "max_tokens": 30, "seed": 1})[1]
    clients = [
        subprocess.Popen([sys.executable, "-c", CLIENT, str(server.port)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    try:
        for client in clients:
            for _ in range(8):
                assert client.stdout.readline() == b"asked\n"
        body = {"prompt": "x", "max_tokens": 30, "seed": 1, "stream": True}
        with connect(server, 30) as sock:
            sock.sendall(request("/v1/completions", body, "connection: close"))
            for client in clients:
                client.send_signal(signal.SIGKILL)
            data = read_all(sock)
    finally:
        for client in clients:
            client.kill()
            client.wait()
            client.stdout.close()
    lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
    assert text == expected["choices"][0]["text"]
    server.until_idle()


def test_sigterm_under_load(start):
    """What runs and waits is answered within the drain's limit, or told; the exit code is 0."""
    server = start("--drain-timeout", "2", "--max-num-seqs", "4")
    answers = []

    def ask(number):
        body = {"prompt": [number], "max_tokens": 100 if number % 2 else 30000,
                "ignore_eos": True, "stream": number % 4 < 2}  # fmt: skip
        with connect(server, 30) as sock:
            sock.sendall(request("/v1/completions", body, "connection: close"))
            ready.release()
            answers.append((number, read_all(sock)))

    ready = threading.Semaphore(0)
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.acquire()
    while server.stats()["running"] + server.stats()["waiting"] < 4:
        pass
    assert server.stop() == 0
    for thread in threads:
        thread.join(30)
    assert len(answers) == 24
    for _number, data in answers:
        # Taken and answered whole, taken and cut off with a word, not taken (any more), or not
        # even accepted as a connection.
        whole = b'"finish_reason":"length"' in data
        assert whole or b"shutting down" in data or not data, data[:300]
    assert any(b'"finish_reason":"length"' in data for _, data in answers)
    assert "Traceback" not in "".join(server.lines)
