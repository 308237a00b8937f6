"""pyllmlite's server beside its peers': each started in turn, one client for all of them.

    python benchmarks/serve_peers.py --client VLLM_PYTHON --tokenizer MODELS/smol \\
        pyllmlite=MODELS/smol-Q4_0.gguf \\
        llamacpp=LLAMA_SERVER:MODELS/smol-Q4_0.gguf \\
        vllm=VLLM_PYTHON:MODELS/smol --out serve_peers.json

A server is ``name=[program:]model[?options]``; a further one of a kind is ``name-label=...``.
Options are those of the server's own command line, as ``quantizer=rtn&bits=4`` or, for llama.cpp,
``parallel=64``.  The client is ``vllm bench serve`` of the environment that ``--client`` is the
Python of: ``--num-prompts`` requests of 128 random tokens, answers of 64 (``--ignore-eos``), all at
once and at ``--rate`` requests per second.  Every server runs alone, with as many threads as there
are CPUs, and is warmed up by eight requests; rounds change the order.  What is printed are medians
over the rounds; ``--out`` is written after each measurement, and a run that is started again with
the same words goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

FIELDS = {
    "output_throughput": "tokens/s",
    "median_ttft_ms": "TTFT",
    "p99_ttft_ms": "p99",
    "median_tpot_ms": "TPOT",
    "p99_tpot_ms": "p99",
    "failed": "failed",
}
# Unless the environment says otherwise: GB of KV, and no core kept free for its HTTP side, as no
# other server keeps one.
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
NAME = "model"  # under which every server serves


def command_of(
    kind: str, program: str, model: str, port: int, options: dict[str, str]
) -> list[str]:
    """What starts a server of this kind on the port."""
    threads = str(len(os.sched_getaffinity(0)))
    if kind == "pyllmlite":
        made = [program or sys.executable, "-m", "pyllmlite", "serve", model, "--port", str(port),
                "--served-model-name", NAME]  # fmt: skip
        options = {"threads": threads, **options}
    elif kind == "llamacpp":
        # Its slots share the context: each has room for one request.
        slots = int(options.get("parallel", "16"))
        made = [program or "llama-server", "--model", model, "--port", str(port), "--alias", NAME]
        options = {"parallel": str(slots), "ctx-size": str(512 * slots), "threads": threads,
                   "threads-batch": threads, **options}  # fmt: skip
    elif kind == "vllm":
        made = [program or sys.executable, "-m", "vllm.entrypoints.openai.api_server",
                "--model", model, "--port", str(port), "--host", "127.0.0.1",
                "--served-model-name", NAME]  # fmt: skip
        options = {"dtype": "bfloat16", "max-model-len": "2048", **options}
    else:
        raise SystemExit(f"no such server: {kind}; there are pyllmlite, llamacpp and vllm")
    for name, value in options.items():
        made += ["--" + name.replace("_", "-"), value]
    return made


class Server:
    """A running server; ``ready_seconds`` from its start to its first answer."""

    def __init__(self, given: str, log: Path) -> None:
        self.name, _, rest = given.partition("=")
        rest, _, query = rest.partition("?")
        program, colon, model = rest.rpartition(":")
        options = dict(part.split("=", 1) for part in query.split("&") if part)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        kind = self.name.partition("-")[0]
        self._log = log
        self._file = log.open("w")
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            command_of(kind, program if colon else "", model, self.port, options),
            stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**VLLM, **os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        while not self._answers():
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} has ended:\n{log.read_text()[-2000:]}")
            if time.perf_counter() - begun > 600:
                self.stop()
                raise SystemExit(f"{self.name} was not ready after 600 s; see {log}")
            time.sleep(0.05)
        self.ready_seconds = time.perf_counter() - begun

    def _answers(self) -> bool:
        try:
            self.ask([1, 2, 3], 1, 10)
        except OSError:
            return False
        return True

    def ask(self, prompt: list[int], tokens: int, timeout: float = 600) -> None:
        body = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(),
            {"content-type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            answer.read()

    def warm_up(self) -> None:
        rng = random.Random(0)
        prompts = [[rng.randrange(1000, 40000) for _ in range(128)] for _ in range(8)]
        threads = [threading.Thread(target=self.ask, args=(p, 64)) for p in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        """With all that it has started."""
        for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(seconds)
                except subprocess.TimeoutExpired:
                    continue
        self._file.close()


def measure(server: Server, client: str, tokenizer: str, count: int, rate: str) -> dict[str, Any]:
    """One run of the client; its own figures."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [client, "-m", "vllm.entrypoints.cli.main", "bench", "serve",
             "--backend", "openai", "--base-url", f"http://127.0.0.1:{server.port}",
             "--model", NAME, "--tokenizer", tokenizer,
             "--dataset-name", "random", "--random-input-len", "128", "--random-output-len", "64",
             "--num-prompts", str(count), "--ignore-eos", "--request-rate", rate,
             "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99",
             "--disable-tqdm", "--save-result", "--result-dir", folder,
             "--result-filename", "result.json"],
            capture_output=True, text=True, timeout=1800,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        file = Path(folder) / "result.json"
        if done.returncode != 0 or not file.exists():
            raise SystemExit(f"the client failed:\n{(done.stdout + done.stderr)[-3000:]}")
        found = json.loads(file.read_text())
    found["failed"] = count - found["completed"]
    return {name: found[name] for name in FIELDS}


def table(results: dict[str, Any], rate: str) -> str:
    """Medians over the rounds, a line per server and rate."""
    lines = [f"{'':22s} {'rate':>5s} " + " ".join(f"{word:>9s}" for word in FIELDS.values())
             + "   ready after"]  # fmt: skip
    for name, found in results.items():
        for one in ("inf", rate):
            runs = found["rates"].get(one, [])
            if runs:
                values = [statistics.median(run[field] for run in runs) for field in FIELDS]
                ready = f"{statistics.median(found['ready']):8.1f} s" if one == "inf" else ""
                lines.append(f"{name:22s} {one:>5s} "
                             + " ".join(f"{value:9.1f}" for value in values) + ready)  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("servers", nargs="+", help="name=[program:]model[?options]")
    parser.add_argument("--client", required=True, help="Python of an environment with vLLM")
    parser.add_argument("--tokenizer", required=True, help="directory of the model's tokenizer")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--rate", default="2", help="requests per second, besides all at once")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("serve_peers.json"))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left running
    words = {"servers": given.servers, "num_prompts": given.num_prompts, "rate": given.rate}
    kept = json.loads(given.out.read_text()) if given.out.exists() else {}
    results = kept.get("results", {}) if kept.get("words") == words else {}
    for number in range(given.rounds):
        shift = number % len(given.servers)
        for one in given.servers[shift:] + given.servers[:shift]:
            name = one.partition("=")[0]
            found = results.setdefault(name, {"ready": [], "rates": {}})
            todo = [r for r in ("inf", given.rate) if len(found["rates"].get(r, ())) <= number]
            if not todo:
                continue
            server = Server(one, given.out.with_suffix(f".{name}.log"))
            try:
                found["ready"].append(server.ready_seconds)
                server.warm_up()
                for rate in todo:
                    figures = measure(
                        server, given.client, given.tokenizer, given.num_prompts, rate
                    )
                    found["rates"].setdefault(rate, []).append(figures)
                    print(f"round {number + 1}, {name}, rate {rate}: {figures}", flush=True)
                    given.out.write_text(json.dumps({"words": words, "results": results}, indent=1))
            finally:
                server.stop()
    print(table(results, given.rate))


if __name__ == "__main__":
    main()
