"""HTTP by hand: what no well-behaved client would send."""

import json
import socket


def connect(server, timeout=10):
    return socket.create_connection(("127.0.0.1", server.port), timeout=timeout)


def request(path, body, *headers):
    """Bytes of a POST; ``body`` is bytes or something for JSON."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json",
             f"content-length: {len(body)}", *headers]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_all(sock):
    """Everything until the other side closes."""
    data = b""
    try:
        while chunk := sock.recv(1 << 16):
            data += chunk
    except (ConnectionResetError, BrokenPipeError):
        pass
    return data


def exchange(server, data, timeout=10):
    """Status and body of the answer to ``data``; (0, b"") if the connection was closed."""
    with connect(server, timeout) as sock:
        try:
            sock.sendall(data)
        except (ConnectionResetError, BrokenPipeError):
            pass
        answer = b""
        try:
            while b"\r\n\r\n" not in answer:
                chunk = sock.recv(1 << 16)
                if not chunk:
                    return 0, b""
                answer += chunk
            head, body = answer.split(b"\r\n\r\n", 1)
            length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n")
                           if line.startswith(b"content-length")), 0)  # fmt: skip
            while len(body) < length:
                chunk = sock.recv(1 << 16)
                if not chunk:
                    break
                body += chunk
        except ConnectionResetError:
            return 0, b""
        return int(head.split(b" ")[1]), body


def post(server, path, body, timeout=10):
    """Status and JSON."""
    status, answer = exchange(server, request(path, body), timeout)
    return status, json.loads(answer) if answer else None
