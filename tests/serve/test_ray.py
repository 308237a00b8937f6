"""Two replicas on one machine behind Ray Serve; a dataset through Ray Data."""

import concurrent.futures
import json
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from raw import connect, exchange, post, read_all, request

ray = pytest.importorskip("ray")
pytest.importorskip("ray.serve")

GREEDY = {"temperature": 0, "max_tokens": 12}


class Cluster:
    """What ``raw`` wants of a server, and a look at the replicas."""

    def __init__(self, port):
        self.port = port

    def get(self, path):
        status, body = exchange(self, f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        return status, body

    def stats(self):
        status, body = self.get("/stats")
        assert status == 200, body
        return json.loads(body)

    def until(self, condition, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.05)

    def until_idle(self):
        self.until(lambda: not (s := self.stats())["running"] and not s["waiting"]
                   and s["num_free_blocks"] == s["num_blocks"])  # fmt: skip


@pytest.fixture(scope="module")
def started():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(_node_ip_address="127.0.0.1", num_cpus=3, include_dashboard=False,
             object_store_memory=100 << 20,
             log_to_driver=False, configure_logging=False)  # fmt: skip
    yield port
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster(started, model):
    from ray import serve

    from pyllmlite.serve.ray import app
    from pyllmlite.serve.ray.deploy import AppArgs

    serve.start(http_options={"host": "127.0.0.1", "port": started})
    serve.run(app(AppArgs(model=model, replicas=2, kv_cache_memory="64MB", max_num_seqs=8)))
    made = Cluster(started)
    made.until(lambda: made.get("/ready")[0] == 200)
    made.until(lambda: len(made.stats()["replicas"]) == 2)
    yield made
    serve.shutdown()


def test_the_same_as_the_plain_server(cluster, server):
    bodies = [
        ("/v1/completions", {"prompt": "Hello, my name is", **GREEDY}),
        ("/v1/completions", {"prompt": ["a b", [5, 6, 7]], "n": 2, "seed": 3, "max_tokens": 5}),
        ("/v1/completions", {"prompt": "x", **GREEDY, "logprobs": 2, "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], **GREEDY}),
        ("/tokenize", {"prompt": "Hello"}),
        ("/v1/completions", {"prompt": "x", "temperature": -1}),
        ("/v1/completions", {"prompt": "x" * 200000}),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"999999": 1}}),
        ("/v1/completions", {"prompt": "x", "model": "other"}),
    ]
    for path, body in bodies:
        mine, plain = post(cluster, path, body, 30), post(server, path, body, 30)
        for _, answer in (mine, plain):
            for name in ("id", "created", "usage"):
                answer.pop(name, None)
        assert mine == plain


def test_streams(cluster, server):
    body = {"prompt": "Once upon a time", "temperature": 1.0, "seed": 1, "max_tokens": 200,
            "ignore_eos": True, "stream": True, "logprobs": 1}  # fmt: skip
    texts = []
    for which in (cluster, server):
        with connect(which, 30) as sock:
            sock.sendall(request("/v1/completions", body, "connection: close"))
            data = read_all(sock)
        lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
        assert lines.pop().strip() == b"[DONE]"
        choices = [json.loads(line)["choices"][0] for line in lines]
        assert sum(len(c["logprobs"]["tokens"]) for c in choices if c["logprobs"]) == 200
        texts.append("".join(choice["text"] for choice in choices))
    assert texts[0] == texts[1]


def test_many_prompts_of_one_request(cluster):
    """They are calls that wait for a replica at the same time."""
    for _ in range(3):
        status, body = post(cluster, "/v1/completions", {"prompt": [[n] for n in range(16)],
                                                         "max_tokens": 2}, 30)  # fmt: skip
        assert status == 200 and len(body["choices"]) == 16


def test_leaving_frees_blocks(cluster):
    with connect(cluster) as sock:
        sock.sendall(request("/v1/completions", {"prompt": "a", "max_tokens": 30000,
                                                 "ignore_eos": True, "stream": True}))  # fmt: skip
        sock.recv(100)
        cluster.until(lambda: cluster.stats()["num_free_blocks"] < cluster.stats()["num_blocks"])
    cluster.until_idle()


def test_a_known_prefix_reaches_the_replica_that_holds_it(cluster):
    rng = random.Random(0)
    starts = [[rng.randrange(3, 250) for _ in range(160)] for _ in range(6)]

    def ask(start):
        ids = start + [rng.randrange(3, 250) for _ in range(20)]
        status, body = post(cluster, "/v1/completions", {"prompt": ids, "max_tokens": 4}, 30)
        assert status == 200
        return body["usage"]["prompt_tokens_details"]["cached_tokens"] >= 144

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(ask, starts))
        hits = list(pool.map(ask, starts * 10))
    assert sum(hits) >= 0.9 * len(hits)


def child_of(pid):
    """The engine's process."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    (child,) = [int(word) for file in children for word in file.read_text().split()]
    return child


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the process in /proc")
@pytest.mark.parametrize("what", ["actor", "engine"])
def test_killing_a_replica_loses_nothing(cluster, server, what):
    """Neither those that wait, nor those that run: they go on where they were."""
    expected = {}
    bodies = [{"prompt": [5 + n, 6, 7], "seed": n, "max_tokens": 400, "ignore_eos": True,
               "temperature": 0.8, "stream": n % 2 == 0} for n in range(24)]  # fmt: skip
    found = {}

    def ask(which, into, number):
        with connect(which, 120) as sock:
            sock.sendall(request("/v1/completions", bodies[number], "connection: close"))
            data = read_all(sock)
        if bodies[number]["stream"]:
            lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
            assert lines.pop().strip() == b"[DONE]", data[-300:]
            parts = [json.loads(line) for line in lines]
            assert "error" not in parts[-1], parts[-1]
            into[number] = "".join(part["choices"][0]["text"] for part in parts)
        else:
            assert b" 200 " in data.split(b"\r\n")[0], data[:300]
            into[number] = json.loads(data.split(b"\r\n\r\n", 1)[1])["choices"][0]["text"]

    for number in range(len(bodies)):
        ask(server, expected, number)
    before = cluster.stats()["replicas"]
    threads = [threading.Thread(target=ask, args=(cluster, found, n)) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    cluster.until(lambda: cluster.stats()["running"] >= 8)
    pid = next(iter(before.values()))
    os.kill(pid if what == "actor" else child_of(pid), signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    assert found == expected
    cluster.until(lambda: len(cluster.stats()["replicas"]) == 2)
    assert cluster.stats()["replicas"] != before
    cluster.until_idle()


def test_metrics_are_of_all_engines(cluster):
    def blocks():
        lines = cluster.get("/metrics")[1].decode().splitlines()
        found = [x.split()[1] for x in lines if x.startswith("pyllmlite_kv_cache_blocks ")]
        return float(found[0]) if found else None

    total = cluster.stats()["num_blocks"]
    cluster.until(lambda: blocks() == total)


@pytest.mark.parametrize(
    ("given", "what"),
    [({"replicas": 3, "max_replicas": 2}, "max_replicas"), ({"max_num_seqs": 0}, "max_num_seqs"),
     ({"no_such_option": 1}, "no_such_option"), ({"max_waiting": -1}, "max_waiting")],
)  # fmt: skip
def test_options_that_cannot_be(given, what):
    from pyllmlite.core.errors import ConfigError
    from pyllmlite.serve.ray import app
    from pyllmlite.serve.ray.deploy import AppArgs

    for args in (AppArgs(**given), {name: str(value) for name, value in given.items()}):
        with pytest.raises(ConfigError, match=what):
            app(args)


def test_options_of_a_command_line():
    from pyllmlite.serve.ray.deploy import AppArgs, engine_options

    args = AppArgs(replicas="2", num_cpus="4", max_num_seqs="8", quantizer="rtn", bits="4")
    assert args.replicas == 2
    made = engine_options(args)
    assert made == {"model": None, "max_num_seqs": 8, "quantizer": "rtn", "bits": 4, "threads": 4}


def test_a_dataset(started, model, llm):
    import ray.data

    from pyllmlite import SamplingParams
    from pyllmlite.core.errors import ConfigError
    from pyllmlite.serve.ray import generate

    params = SamplingParams(**GREEDY)
    texts = [f"Number {n}:" for n in range(20)] + ["x" * 100_000]
    rows = ray.data.from_items([{"id": n, "prompt": text} for n, text in enumerate(texts)])
    answers = generate(rows, model, sampling_params=params, replicas=2, batch_size=4,
                       num_cpus=0.5, kv_cache_memory="64MB")  # fmt: skip
    found = sorted(answers.take_all(), key=lambda row: row["id"])
    expected = llm.generate(texts[:-1], params, use_tqdm=False)
    assert [row["generated"] for row in found[:-1]] == [o.outputs[0].text for o in expected]
    assert {row["generated_tokens"] for row in found[:-1]} == {12}
    assert found[-1]["generated"] is None and "tokens" in found[-1]["generated_error"]
    with pytest.raises(ConfigError, match="n must be 1"):
        generate(rows, model, sampling_params=SamplingParams(n=2))


def test_conversations_and_token_ids(started, model, llm):
    import ray.data

    from pyllmlite import SamplingParams
    from pyllmlite.serve.ray import generate

    params = SamplingParams(**GREEDY)
    talks = [[{"role": "user", "content": "hi"}], [{"role": "system", "content": "be brief"},
                                                   {"role": "user", "content": "ho"}]]  # fmt: skip
    rows = ray.data.from_items([{"prompt": talk} for talk in talks])
    found = generate(rows, model, sampling_params=params, num_cpus=0.5,
                     kv_cache_memory="64MB").take_all()  # fmt: skip
    expected = llm.chat(talks, params, use_tqdm=False)
    assert sorted(r["generated"] for r in found) == sorted(o.outputs[0].text for o in expected)
    rows = ray.data.from_items([{"prompt": [5, 6, 7]}])
    found = generate(rows, model, sampling_params=params, num_cpus=0.5,
                     kv_cache_memory="64MB").take_all()  # fmt: skip
    expected = llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
    assert found[0]["generated"] == expected[0].outputs[0].text
