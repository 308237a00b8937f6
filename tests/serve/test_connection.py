"""Connections end: idle ones, those nobody reads from, those whose client has left."""

import asyncio
import contextlib
import socket

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httptools")

GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(app, **timeouts):
    """An application behind our connections, on a port of its own; gives clients' sockets."""
    import uvicorn
    from uvicorn.server import ServerState

    from pyllmlite.serve.connection import connection_class

    config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_keep_alive=60)
    config.load()
    state = ServerState()
    made = connection_class(**timeouts)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: made(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    port = server.sockets[0].getsockname()[1]
    opened = []

    async def connect():
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        opened.append(sock)
        return sock

    async def until(condition):
        end = loop.time() + 5
        while not condition():
            assert loop.time() < end
            await asyncio.sleep(0.005)

    try:
        yield connect, state, until
    finally:
        for sock in opened:
            sock.close()
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()


def answering(body):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-length", b"%d" % len(body))]})  # fmt: skip
        await send({"type": "http.response.body", "body": body})

    return app


async def everything(sock):
    loop = asyncio.get_running_loop()
    data = b""
    while chunk := await asyncio.wait_for(loop.sock_recv(sock, 1 << 16), 5):
        data += chunk
    return data


def test_a_stray_byte_does_not_keep_a_connection():
    async def main():
        async with serving(answering(b"hi"), header_timeout=0.1) as (connect, _, _):
            sock = await connect()
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, GET)
            assert (await loop.sock_recv(sock, 1000)).endswith(b"hi")
            await loop.sock_sendall(sock, b"\r\n")
            await everything(sock)

    asyncio.run(main())


def test_keep_alive_still_works():
    async def main():
        async with serving(answering(b"hi"), header_timeout=5) as (connect, _, _):
            sock = await connect()
            loop = asyncio.get_running_loop()
            for between in (b"", b"\r\n", b""):
                await loop.sock_sendall(sock, between + GET)
                assert (await loop.sock_recv(sock, 1000)).endswith(b"hi")

    asyncio.run(main())


@pytest.mark.parametrize("close", [True, False])
def test_an_answer_that_nobody_reads_is_thrown_away(close):
    async def main():
        app = answering(b"x" * (16 << 20))
        async with serving(app, header_timeout=5, read_timeout=0.1) as (connect, state, until):
            sock = await connect()
            data = GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") if close else GET
            await asyncio.get_running_loop().sock_sendall(sock, data)
            await until(lambda: state.total_requests == 1)
            assert len(state.connections) == 1
            await until(lambda: not state.connections)

    asyncio.run(main())


def test_a_slow_reader_gets_everything():
    async def main():
        app = answering(b"x" * (12 << 20))
        async with serving(app, header_timeout=5, read_timeout=0.1) as (connect, _, _):
            sock = await connect()
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, GET)
            total = 0
            while total < 12 << 20:
                data = await asyncio.wait_for(loop.sock_recv(sock, 1 << 17), 5)
                assert data
                total += len(data)
                await asyncio.sleep(0.002)

    asyncio.run(main())


@pytest.mark.parametrize("second", [GET, GET[:9], GET * 50, GET + b"\0nonsense", b"\0nonsense"])
def test_one_who_has_sent_a_second_request_is_seen_leaving(second):
    async def main():
        ends = []

        async def app(scope, receive, send):
            while (await receive())["type"] != "http.disconnect":
                pass
            ends.append(scope["path"])

        async with serving(app, header_timeout=0.1) as (connect, _, until):
            sock = await connect()
            await asyncio.get_running_loop().sock_sendall(sock, GET + second)
            await asyncio.sleep(0.3)
            assert not ends
            sock.close()
            await until(lambda: ends == ["/"])

    asyncio.run(main())


@pytest.mark.parametrize("second", [GET, GET[:9], b"\0nonsense"])
@pytest.mark.parametrize("apart", [True, False])
def test_what_is_sent_too_early_does_not_hurt_the_answer(second, apart):
    async def main():
        go = asyncio.Event()
        began = []

        async def app(scope, receive, send):
            began.append(list(scope["headers"]))
            await go.wait()
            await answering(b"hi")(scope, receive, send)
            assert scope["headers"] == began[0]

        async with serving(app, header_timeout=5) as (connect, _, until):
            sock = await connect()
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, GET if apart else GET + second)
            await until(lambda: began)
            if apart:
                await loop.sock_sendall(sock, second)
                await asyncio.sleep(0.05)
            go.set()
            data = await everything(sock)
            assert data.endswith(b"\r\n\r\nhi") and data.count(b"HTTP/1.1") == 1
            assert b"connection: close" in data and len(began) == 1

    asyncio.run(main())
