"""Servers in processes of their own, over a tiny model whose answers may be very long."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from text_model import write_text_model

for package in ("fastapi", "uvicorn", "httptools", "prometheus_client", "openai"):
    pytest.importorskip(package)

LENGTH = 32768  # tokens: half a minute of generation


class Server:
    """A running ``pyllmlite serve``; everything it writes goes to ``lines``."""

    def __init__(self, model, *options, env=None):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyllmlite", "serve", model, "--port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYLLMLITE_API_KEY": "", "PYLLMLITE_DEBUG": "", **(env or {})},
        )
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        line = self._until("listening on")
        self.url = re.search(r"http://\S+:\d+", line)[0]
        self.port = int(self.url.rsplit(":", 1)[1])
        self.key = ""

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def _until(self, word, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if word in line:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no {word!r} in {self.lines}")

    def get(self, path, timeout=10):
        """(status, body); the body is JSON if it can be."""
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, headers=headers), timeout=timeout
            ) as response:
                status, body = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        try:
            return status, json.loads(body)
        except ValueError:
            return status, body.decode()

    def wait_ready(self, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.get("/ready")[0] == 200:
                return self
            assert self.process.poll() is None, self.lines
            time.sleep(0.02)
        raise AssertionError(f"not ready: {self.lines}")

    def stats(self):
        status, body = self.get("/stats")
        assert status == 200, body
        return body

    def until_idle(self, seconds=5.0):
        """All sequences gone, all KV blocks free."""
        end = time.monotonic() + seconds
        while True:
            stats = self.stats()
            if not stats["running"] and not stats["waiting"]:
                assert stats["num_free_blocks"] == stats["num_blocks"]
                return
            assert time.monotonic() < end, stats
            time.sleep(0.01)

    def stop(self, number=signal.SIGTERM, timeout=20):
        """Exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        self._reader.join(5)
        return code


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = write_text_model(tmp_path_factory.mktemp("models") / "tiny")
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = LENGTH
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="session")
def server(model):
    """One server for all tests that leave it as they found it."""
    made = Server(model, "--kv-cache-memory", "64MB", "--threads", "1").wait_ready()
    yield made
    made.stop()


@pytest.fixture
def start(model):
    """Start a server of one's own."""
    made = []

    def start(*options, ready=True, at=model, env=None):
        made.append(Server(at, "--threads", "1", "--kv-cache-memory", "64MB", *options, env=env))
        return made[-1].wait_ready() if ready else made[-1]

    yield start
    for server in made:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def client(server):
    import openai

    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="session")
def llm(model):
    """The same model in this process."""
    from pyllmlite import LLM

    return LLM(model, threads=1, kv_cache_memory="64MB")
