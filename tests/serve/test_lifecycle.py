"""Leaving, waiting, timing out, draining, dying: each ends as it is described, and nobody hangs."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from raw import connect, exchange, post, read_all, request

LONG = {"prompt": "a", "max_tokens": 30000, "ignore_eos": True, "temperature": 0}
SHORT = {"prompt": "b", "max_tokens": 5, "temperature": 0}


def open_long(server, **more):
    """A long request whose answer has begun to be computed."""
    before = server.stats()["running"] + server.stats()["waiting"]
    sock = connect(server)
    sock.sendall(request("/v1/completions", {**LONG, **more}))
    end = time.monotonic() + 5
    while server.stats()["running"] + server.stats()["waiting"] == before:
        assert time.monotonic() < end
        time.sleep(0.005)
    return sock


@pytest.mark.parametrize("more", [{"stream": True}, {}, {"prompt": ["a", "b"], "n": 2,
                                                        "temperature": 1.0, "stream": True}])
def test_leaving_frees_blocks(server, more):
    sock = open_long(server, **more)
    assert server.stats()["num_free_blocks"] < server.stats()["num_blocks"]
    sock.close()
    server.until_idle(2)


def test_half_closed_is_gone(server):
    with open_long(server, stream=True) as sock:
        sock.shutdown(socket.SHUT_WR)
        server.until_idle(2)


def test_queue_is_bounded(start):
    server = start("--max-num-seqs", "1", "--max-waiting", "1")
    first, second = open_long(server), open_long(server)
    status, body = post(server, "/v1/completions", SHORT)
    assert status == 429 and body["error"]["code"] == "queue_full"
    data = exchange_headers(server, request("/v1/chat/completions", {
        "messages": [{"role": "user", "content": "x"}], "stream": True}))  # fmt: skip
    assert b" 429 " in data.split(b"\r\n")[0] and b"retry-after: " in data.lower()
    second.close()
    first.close()
    server.until_idle()
    assert post(server, "/v1/completions", SHORT)[0] == 200
    metrics = server.get("/metrics")[1]
    assert 'pyllmlite_requests_refused_total{status="429"} 2.0' in metrics


def exchange_headers(server, data):
    with connect(server) as sock:
        sock.sendall(data)
        return sock.recv(4096)


def test_request_timeout(start):
    server = start("--request-timeout", "0.4")
    status, body = post(server, "/v1/completions", LONG)
    assert status == 504 and body["error"]["type"] == "timeout_error"
    with connect(server) as sock:
        sock.sendall(request("/v1/completions", {**LONG, "stream": True}, "connection: close"))
        data = read_all(sock)
    assert b"timeout_error" in data and data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    server.until_idle()


def test_slow_reader_holds_nobody_up(start):
    server = start("--request-timeout", "3")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", server.port))
        slow.sendall(request("/v1/completions", {**LONG, "stream": True, "logprobs": 20}))
        for _ in range(5):
            assert post(server, "/v1/completions", SHORT, timeout=2)[0] == 200
        time.sleep(3)
        server.until_idle()  # it takes nothing, and ends all the same


def test_sigterm_drains(start):
    server = start()
    answers = []
    with connect(server, 30) as sock:
        sock.sendall(request("/v1/completions", {**LONG, "max_tokens": 2500, "stream": True}))
        answers.append(sock.recv(100))
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(OSError):
            connect(server).recv(1)
        answers.append(read_all(sock))
    data = b"".join(answers)
    assert b'"finish_reason":"length"' in data and data.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
    assert server.stop() == 0


def test_drain_has_a_limit(start):
    server = start("--drain-timeout", "1")
    with open_long(server, stream=True) as streamed, open_long(server) as whole:
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 8
        assert read_all(whole).startswith(b"HTTP/1.1 503")
        data = read_all(streamed)
    assert b"shutting down" in data and b"data: [DONE]" in data
    assert "Traceback" not in "".join(server.lines)


def test_sigterm_while_loading(start):
    assert start(ready=False).stop() == 0


def test_idle_connections_do_not_hold_the_drain(start):
    server = start()
    with connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        sock.recv(1000)
        begun = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - begun < 5


def one_error_line(server):
    errors = [line for line in server.lines if line.startswith("pyllmlite: error: ")]
    assert len(errors) == 1 and "Traceback" not in "".join(server.lines), server.lines
    return errors[0]


def worker_of(server):
    (pid,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if f") S {server.process.pid} " in read(path) or f") R {server.process.pid} " in read(path)
    ]
    return pid


def read(path):
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the process in /proc")
@pytest.mark.parametrize("stream", [False, True])
def test_death_of_the_engine(start, stream):
    server = start()
    with open_long(server, stream=stream) as sock:
        os.kill(worker_of(server), signal.SIGKILL)
        data = read_all(sock)
    assert b"the engine has stopped" in data and b"service_unavailable_error" in data
    assert stream or data.startswith(b"HTTP/1.1 503")
    assert server.process.wait(10) == 1
    server.stop()
    assert "the engine has stopped" in one_error_line(server)


def test_death_of_the_server_ends_the_engine(start):
    server = start()
    with open_long(server):
        pid = worker_of(server)
        server.process.kill()
        server.process.wait()
        end = time.monotonic() + 5
        while f" ({'python'}" in read(Path(f"/proc/{pid}/stat")) and " Z " not in read(
            Path(f"/proc/{pid}/stat")
        ):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_model_that_cannot_be_loaded(start, tmp_path):
    (tmp_path / "config.json").write_text("{")
    server = start(ready=False, at=str(tmp_path))
    assert server.process.wait(20) == 1
    server.stop()
    assert "config.json" in one_error_line(server)


def test_port_in_use(server, model):
    done = subprocess.run(
        [sys.executable, "-m", "pyllmlite", "serve", model, "--port", str(server.port)],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("pyllmlite: error: cannot listen on 127.0.0.1:") and "in use" in line


def test_full_disk_under_the_log(model):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(
            [sys.executable, "-m", "pyllmlite", "serve", model, "--port", str(port),
             "--access-log", "--threads", "1", "--kv-cache-memory", "64MB"],
            stderr=full, stdout=full,
        )  # fmt: skip
    try:
        server = type("Server", (), {"port": port})
        end = time.monotonic() + 20
        while True:
            try:
                if exchange(server, b"GET /ready HTTP/1.1\r\nhost: localhost\r\n\r\n")[0] == 200:
                    break
            except OSError:
                pass
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        assert post(server, "/v1/completions", SHORT)[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_missing_package(monkeypatch):
    import importlib.util

    from pyllmlite.core.errors import ConfigError
    from pyllmlite.serve.server import check_packages

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "uvicorn" else real(n))
    with pytest.raises(ConfigError, match=r"needs uvicorn: pip install 'pyllmlite\[serve\]'"):
        check_packages()


def test_api_keys(start, tmp_path):
    (tmp_path / "keys").write_text("# ours\nfrom-file\n")
    server = start("--api-key-file", str(tmp_path / "keys"), env={"PYLLMLITE_API_KEY": "one,two"})
    for path in ("/", "/health", "/ready"):
        assert server.get(path)[0] == 200
    for path in ("/v1/models", "/metrics", "/stats", "/openapi.json", "/nothing"):
        status, body = server.get(path)
        assert status == 401 and body["error"]["code"] == "invalid_api_key"
    for key in ("from-file", "one", "two"):
        server.key = key
        assert server.get("/v1/models")[0] == 200
    for key in ("from-fil", "from-file ", "# ours", "one,two"):
        server.key = key
        assert server.get("/v1/models")[0] == (200 if key.strip() == "from-file" else 401)


def test_keys_that_cannot_be(tmp_path, monkeypatch):
    from pyllmlite.core.errors import ConfigError
    from pyllmlite.serve.settings import read_api_keys

    monkeypatch.delenv("PYLLMLITE_API_KEY", raising=False)
    assert read_api_keys(None) == ()
    for text in ("", "# nothing\n", "two words\n", "ä\n"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(ConfigError):
            read_api_keys(tmp_path / "keys")
    with pytest.raises(ConfigError):
        read_api_keys(tmp_path / "absent")


def test_cors_is_off_unless_asked(server, start):
    origin = "origin: https://example.org"
    preflight = ("OPTIONS /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + origin
                 + "\r\naccess-control-request-method: POST\r\n\r\n").encode()  # fmt: skip
    assert b"access-control" not in exchange_headers(server, preflight).lower()
    asked = start("--cors-origin", "https://example.org")
    assert b"access-control-allow-origin: https://example.org" in exchange_headers(
        asked, preflight
    ).lower()
    data = exchange_headers(asked, request("/v1/completions", SHORT, origin))
    assert b"access-control-allow-origin: https://example.org" in data.lower()


def test_many_leave_while_others_stay(server):
    expected = post(server, "/v1/completions", {**SHORT, "max_tokens": 50})[1]["choices"][0]["text"]
    found = []

    def stay():
        body = post(server, "/v1/completions", {**SHORT, "max_tokens": 50}, 30)[1]
        found.append(body["choices"][0]["text"])

    def leave():
        with connect(server) as sock:
            sock.sendall(request("/v1/completions", {**LONG, "stream": True}))
            sock.recv(200)

    threads = [threading.Thread(target=stay if i % 2 else leave) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [expected] * 12
    server.until_idle()


def test_stream_is_json_all_through(server):
    with connect(server) as sock:
        sock.sendall(request("/v1/completions", {**SHORT, "stream": True, "max_tokens": 30},
                             "connection: close"))  # fmt: skip
        data = read_all(sock)
    lines = [line for line in data.split(b"\n") if line.startswith(b"data: ")]
    assert lines.pop() == b"data: [DONE]"
    assert all(json.loads(line[6:])["object"] == "text_completion" for line in lines)


def test_file_limit_is_raised_as_far_as_it_goes():
    code = (
        "import resource as r; from pyllmlite.serve.server import raise_file_limit as f\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 200)); f(50); print(r.getrlimit(r.RLIMIT_NOFILE)[0])\n"
        "f(100); print(r.getrlimit(r.RLIMIT_NOFILE)[0])\n"
        "f(300); print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["64", "100", "200"]
