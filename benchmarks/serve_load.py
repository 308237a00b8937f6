"""The HTTP server beside ``LLM.generate``, on the same work; and a soak.

    python benchmarks/serve_load.py load MODEL [--clients 64] [--rounds 3]
    python benchmarks/serve_load.py soak MODEL [--clients 32] [--seconds 1200]

``load``: requests of 128 random prompt tokens and 64 generated ones, all at once, streamed, one
connection each.  The offline engine (a process of its own, idle meanwhile) and the server run in
turn.  The client is plain sockets, since it shares the machine with what it measures.

``soak``: clients with random parameters, of whom one in five leaves in mid-stream.  The KV pool is
small, so that all of it has been touched within the first tenth of the time, from whose end on
memory is compared.  It fails if anybody who stayed was not served, a KV block is not free at the
end, or memory grew by more than 5 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PROMPT, OUTPUT = 128, 64
OFFLINE = """
import json, sys, time
from pyllmlite import LLM, SamplingParams
llm = LLM(sys.argv[1])
params = SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True)
llm.generate([[1, 2, 3]] * 4, params, use_tqdm=False)
print("ready", flush=True)
for line in sys.stdin:
    prompts = json.loads(line)
    begun = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begun
    print(sum(len(o.outputs[0].token_ids) for o in outputs) / seconds, flush=True)
"""


class Server:
    """``pyllmlite serve`` on a free port; ``ready_seconds`` from its start to ``/ready``."""

    def __init__(self, model: str, *options: str) -> None:
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyllmlite", "serve", model, "--port", "0", *options],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"http://127.0.0.1:(\d+)", line):
                self.port = int(found[1])
                break
        while True:
            try:
                self.get("/ready")
                break
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit(self.process.stderr.read()) from None
                time.sleep(0.01)
        self.ready_seconds = time.perf_counter() - begun

    def get(self, path: str) -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.read()

    def stats(self) -> dict:
        return json.loads(self.get("/stats"))

    def resident(self) -> list[float]:
        """MB of the HTTP process and of the engine's."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        pids = [self.process.pid, *map(int, children.split())]
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
        return [int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024 for text in texts]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


async def ask(
    port: int, body: dict, leave_after: int | None = None
) -> tuple[float, float, bytes]:
    """(seconds to the first token, to the end, all bytes).  ``leave_after``: chunks."""
    data = json.dumps(body).encode()
    begun = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data
    )
    first, answer, seen = 0.0, [], 0
    while chunk := await reader.read(1 << 16):
        answer.append(chunk)
        if not first and b'"text"' in chunk:
            first = time.perf_counter() - begun
        seen += chunk.count(b'"text"')
        if leave_after is not None and seen >= leave_after:
            break
    writer.close()
    return first, time.perf_counter() - begun, b"".join(answer)


def prompts_of(rng: random.Random, count: int) -> list[list[int]]:
    return [[rng.randrange(1000, 40000) for _ in range(PROMPT)] for _ in range(count)]


async def through_http(port: int, prompts: list[list[int]]) -> tuple[float, float, float]:
    """(output tokens per second, median TTFT, median TPOT)."""
    bodies = [
        {"prompt": p, "max_tokens": OUTPUT, "ignore_eos": True, "temperature": 0, "stream": True,
         "stream_options": {"include_usage": True}}
        for p in prompts
    ]  # fmt: skip
    begun = time.perf_counter()
    answers = await asyncio.gather(*[ask(port, body) for body in bodies])
    seconds = time.perf_counter() - begun
    tokens = 0
    for _, _, data in answers:
        found = re.search(rb'"completion_tokens":(\d+)', data)
        assert found is not None and data.rstrip().endswith(b"0"), data[-300:]
        tokens += int(found[1])
    assert tokens == OUTPUT * len(prompts)
    ttft = statistics.median(a[0] for a in answers)
    tpot = statistics.median((a[1] - a[0]) / (OUTPUT - 1) for a in answers)
    return tokens / seconds, ttft, tpot


def load(model: str, clients: int, rounds: int) -> None:
    server = Server(model)
    print(f"ready after {server.ready_seconds:.2f} s")
    offline = subprocess.Popen(
        [sys.executable, "-c", OFFLINE, model, str(OUTPUT)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert offline.stdin is not None and offline.stdout is not None
    assert offline.stdout.readline() == "ready\n"
    rng = random.Random(0)
    asyncio.run(through_http(server.port, prompts_of(rng, 4)))
    shares = []
    for _ in range(rounds):
        prompts = prompts_of(rng, clients)
        offline.stdin.write(json.dumps(prompts) + "\n")
        offline.stdin.flush()
        alone = float(offline.stdout.readline())
        online, ttft, tpot = asyncio.run(through_http(server.port, prompts))
        shares.append(online / alone)
        print(
            f"offline {alone:7.1f} tok/s   server {online:7.1f} tok/s ({online / alone:.0%})   "
            f"TTFT {ttft * 1e3:.0f} ms   TPOT {tpot * 1e3:.1f} ms", flush=True,
        )  # fmt: skip
    print(f"median share {statistics.median(shares):.1%}")
    offline.stdin.close()
    offline.wait()
    print("exit code", server.stop())


async def one_client(port: int, rng: random.Random, end: float, counts: dict[str, int]) -> None:
    while time.perf_counter() < end:
        leaves = rng.random() < 0.2
        body = {
            "prompt": [rng.randrange(1000, 40000) for _ in range(rng.randint(1, 200))],
            "max_tokens": rng.randint(1, 100),
            "temperature": rng.choice([0, 0.7, 1.3]),
            "top_p": rng.choice([1, 0.9]),
            "stream": leaves or rng.random() < 0.7,
            "logprobs": rng.choice([None, None, 3]),
            "stop": rng.choice([None, None, ["the", "\n\n"]]),
        }
        if rng.random() < 0.1:
            body["structured_outputs"] = {"regex": f"[a-z ]{{1,{rng.randint(1, 50)}}}"}
        if body["temperature"]:
            body["n"] = rng.choice([1, 1, 2])
        _, _, data = await ask(port, body, rng.randint(1, 20) if leaves else None)
        if b"HTTP/1.1 200" in data and b'"error"' not in data and (
            data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") if body["stream"] else True
        ):
            counts["served"] += 1
        elif leaves:
            counts["left"] += 1
        else:
            counts["failed"] += 1
            print(data[:500])


def soak(model: str, clients: int, seconds: float, memory: str) -> None:
    server = Server(model, "--kv-cache-memory", memory)
    counts = {"served": 0, "left": 0, "failed": 0}

    async def body() -> list[float]:
        begun = time.perf_counter()
        end = begun + seconds
        tasks = [
            asyncio.create_task(one_client(server.port, random.Random(i), end, counts))
            for i in range(clients)
        ]
        early = None
        while time.perf_counter() < end:
            await asyncio.sleep(min(20, seconds / 20))
            resident = server.resident()
            if early is None and time.perf_counter() - begun > seconds / 10:
                early = resident
            print(f"{time.perf_counter() - begun:5.0f} s", counts,
                  "MB:", [round(mb, 1) for mb in resident], flush=True)  # fmt: skip
        await asyncio.gather(*tasks)
        await asyncio.sleep(0.5)
        assert early is not None
        return [late / first - 1 for first, late in zip(early, server.resident(), strict=True)]

    growth = asyncio.run(body())
    print("growth of the HTTP process and the engine's:", [f"{share:+.1%}" for share in growth])
    stats = server.stats()
    print(counts, {k: stats[k] for k in ("running", "waiting", "num_blocks", "num_free_blocks",
                                         "preemptions", "evictions")})  # fmt: skip
    print("exit code", server.stop())
    assert stats["num_free_blocks"] == stats["num_blocks"] and not counts["failed"]
    assert max(growth) <= 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["load", "soak"])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--kv-cache-memory", default="128MB", help="of the soak")
    given = parser.parse_args()
    if given.what == "load":
        load(given.model, given.clients or 64, given.rounds)
    else:
        soak(given.model, given.clients or 32, given.seconds, given.kv_cache_memory)


if __name__ == "__main__":
    main()
