"""The server on Ray beside the plain one, all on this machine: what it costs, and what it keeps.

    python benchmarks/serve_ray.py [MODEL] [--clients 16] [--rounds 5] [--json FILE]

``overhead``: one engine with all cores behind Ray, and the same behind the plain server, in turn:
requests of one token one by one, and streams at once.  ``prefixes``: two replicas with a core each;
how many requests whose prefix was seen before found it in the cache of the replica they came to.
``kill``: the same two, one of them killed while streams run and wait; how many requests ended
otherwise than without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import time
import urllib.request
from typing import Any

from serve_load import Server, ask, prompts_of, through_http

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


class Cluster:
    """``pyllmlite.serve.ray:app`` on a cluster of one machine."""

    def __init__(self, model: str | None, replicas: int, num_cpus: int, **options: Any) -> None:
        from ray import serve

        from pyllmlite.serve.ray import app
        from pyllmlite.serve.ray.deploy import AppArgs

        args = AppArgs(model=model, replicas=replicas, num_cpus=num_cpus, **options)
        serve.run(app(args))
        self.port = PORT
        while True:
            try:
                self.get("/ready")
                if len(self.stats()["replicas"]) == replicas:
                    break
            except OSError:
                pass
            time.sleep(0.2)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read()

    def stats(self) -> dict:
        return json.loads(self.get("/stats"))

    def stop(self) -> None:
        from ray import serve

        serve.delete("default")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


PORT = free_port()


async def one_by_one(port: int, count: int, tokens: int) -> float:
    """Median seconds of a request for ``tokens`` tokens, one at a time."""
    rng = random.Random(0)
    seconds = []
    for prompt in prompts_of(rng, count):
        body = {"prompt": prompt[:8], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        seconds.append((await ask(port, body))[1])
    return statistics.median(seconds)


def overhead(cluster: Cluster, plain: Server, clients: int, rounds: int) -> dict[str, Any]:
    """Both in turn; the best of the rounds, since the machine is shared."""
    best: dict[str, dict[str, float]] = {"plain": {}, "ray": {}}
    rng = random.Random(1)
    for number in range(rounds + 1):
        prompts = prompts_of(rng, clients)
        for name, port in (("plain", plain.port), ("ray", cluster.port)):
            short = asyncio.run(one_by_one(port, 20, 1))
            rate, ttft, tpot = asyncio.run(through_http(port, prompts))
            _, ttft_one, tpot_one = asyncio.run(through_http(port, prompts[:1]))
            if number == 0:
                continue  # the first one warms up
            found = best[name]
            for key, value in (("one token, ms", short * 1e3), ("TTFT alone, ms", ttft_one * 1e3),
                               ("TPOT alone, ms", tpot_one * 1e3),
                               (f"TTFT of {clients}, ms", ttft * 1e3),
                               (f"TPOT of {clients}, ms", tpot * 1e3)):  # fmt: skip
                found[key] = min(found.get(key, value), value)
            key = f"tokens/s of {clients}"
            found[key] = max(found.get(key, 0.0), rate)
    for key in best["plain"]:
        print(f"  {key:22s} plain {best['plain'][key]:8.1f}   Ray {best['ray'][key]:8.1f}")
    return best


def prefixes(cluster: Cluster, clients: int) -> dict[str, Any]:
    """24 beginnings of 256 tokens, 10 requests each in any order, ``clients`` at a time."""
    rng = random.Random(2)
    starts = [p + q for p, q in zip(prompts_of(rng, 24), prompts_of(rng, 24), strict=True)]

    async def one(start: list[int], gate: asyncio.Semaphore) -> int:
        ids = start + prompts_of(rng, 1)[0][:32]
        async with gate:
            _, _, data = await ask(cluster.port, {"prompt": ids, "max_tokens": 8})
        return json.loads(data[data.index(b'{"id"'):])["usage"]["prompt_tokens_details"][
            "cached_tokens"]  # fmt: skip

    async def all_of(asked: list[list[int]]) -> list[int]:
        gate = asyncio.Semaphore(clients)
        return await asyncio.gather(*[one(start, gate) for start in asked])

    asyncio.run(all_of(starts))
    again = starts * 10
    rng.shuffle(again)
    cached = asyncio.run(all_of(again))
    found = {"requests": len(again), "reached": sum(count >= 256 - 16 for count in cached)}
    print(f"  {found['reached']} of {found['requests']} requests with a known prefix reached it")
    return found


def kill(cluster: Cluster) -> dict[str, Any]:
    """48 streams on 2 x 8 places: 16 run, the others wait, when a replica is killed."""
    rng = random.Random(3)
    bodies = [{"prompt": prompt[:16], "max_tokens": 48, "ignore_eos": True, "seed": seed,
               "temperature": 0.8, "stream": True} for seed, prompt in
              enumerate(prompts_of(rng, 48))]  # fmt: skip

    def text(data: bytes) -> str:
        lines = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
        parts = [json.loads(line) for line in lines]
        return "".join(p["choices"][0]["text"] for p in parts if "choices" in p)

    async def run(kill_at: int | None) -> list[tuple[bytes, float]]:
        ended = 0

        async def one(body: dict) -> tuple[bytes, float]:
            nonlocal ended
            _, seconds, data = await ask(cluster.port, body)
            ended += 1
            return data, seconds

        tasks = [asyncio.create_task(one(body)) for body in bodies]
        if kill_at is not None:
            pids = cluster.stats()["replicas"]
            while ended < kill_at:
                await asyncio.sleep(0.01)
            os.kill(next(iter(pids.values())), signal.SIGKILL)
        return await asyncio.gather(*tasks)

    expected = [text(data) for data, _ in asyncio.run(run(None))]
    begun = time.perf_counter()
    found = asyncio.run(run(4))
    seconds = time.perf_counter() - begun
    lost = sum(b"[DONE]" not in data or b'"error"' in data for data, _ in found)
    other = sum(text(data) != e for (data, _), e in zip(found, expected, strict=True))
    print(f"  {lost} of {len(bodies)} requests lost, {other} with another text; {seconds:.1f} s")
    begun = time.perf_counter()
    while len(cluster.stats()["replicas"]) < 2:
        time.sleep(0.1)
    print(f"  two replicas again after {time.perf_counter() - begun:.1f} s more")
    return {"requests": len(bodies), "lost": lost, "other text": other}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--only", choices=["overhead", "replicas"])
    given = parser.parse_args()
    import ray
    from ray import serve

    cores = len(os.sched_getaffinity(0))
    ray.init(_node_ip_address="127.0.0.1", num_cpus=max(cores, 2), include_dashboard=False,
             log_to_driver=False, object_store_memory=200 << 20)  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    figures: dict[str, Any] = {}
    if given.only != "replicas":
        print(f"overhead: one engine with {cores} threads, {given.clients} clients", flush=True)
        cluster = Cluster(given.model, 1, cores)
        plain = Server(given.model or "smollm2-135m", "--threads", str(cores))
        figures["overhead"] = overhead(cluster, plain, given.clients, given.rounds)
        plain.stop()
        cluster.stop()
    if given.only != "overhead":
        print("two replicas with a thread each", flush=True)
        cluster = Cluster(given.model, 2, 1, max_num_seqs=8, kv_cache_memory="1GiB")
        figures["prefixes"] = prefixes(cluster, given.clients)
        figures["kill"] = kill(cluster)
        cluster.stop()
    serve.shutdown()
    ray.shutdown()
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
