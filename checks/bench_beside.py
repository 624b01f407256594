"""What runs beside what is measured: load generators, scripted workers and bare servers.

Each is the function of a process of its own (`Bench.beside`), called with a pipe for its results, and lean enough not
to be what is measured.
"""

import asyncio
import http.client
import json
import logging
import select
import signal
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, broadcast, serve

CONFIGS, BATCH, ENQUEUE, GO, SETTLED, RUNNING = 1, 31, 2, 16, 18, 1
LENGTH = struct.Struct(">I")


def post_for(pipe: Any, port: int, connections: int, seconds: float) -> None:
    """POST over keep-alive connections, each again as soon as it is answered; send how many a second were answered."""
    request = b"POST /api/jobs/empty HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    poll = select.epoll()
    sockets = {}
    for _ in range(connections):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        sockets[connection.fileno()] = connection
        connection.sendall(request)
        connection.recv(4096)
        poll.register(connection, select.EPOLLIN)
    for connection in sockets.values():
        connection.sendall(request)
    answered, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        for descriptor, _event in poll.poll():
            answer = sockets[descriptor].recv(4096)
            if answer[9:12] != b"200":
                raise RuntimeError(f"not an answer: {answer!r}")
            answered += 1
            sockets[descriptor].send(request)
    pipe.send(answered / (time.perf_counter() - began))


class Bare(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_POST(self) -> None:
        body = b'{"id":1,"name":"empty","queuing":true,"running":false,"success":false}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def bare_http(pipe: Any) -> None:
    """http.server that answers every POST at once."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bare)
    server.handle_error = lambda *_arguments: None  # type: ignore[method-assign]
    pipe.send(server.server_address[1])
    server.serve_forever()


def waits(pipe: Any, port: int, count: int, name: str = "empty", seconds: int = 60) -> None:
    """POST jobs one by one, each with ?wait; send the milliseconds each answer took."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        connection.request("POST", f"/api/jobs/{name}?wait={seconds}")
        answer = json.loads(connection.getresponse().read())
        times.append((time.perf_counter() - began) * 1_000)
        if seconds and not answer.get("success"):
            raise RuntimeError(f"not a success: {answer}")
    pipe.send(times)


def listen(pipe: Any, port: int, paths: list[str]) -> None:
    """GET paths whose answers never end, and read all that comes, for ever; send a word once each has begun."""
    poll, sockets = select.epoll(), {}
    for path in paths:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        if not connection.recv(65536).startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"no 200 for {path}")
        sockets[connection.fileno()] = connection
        poll.register(connection, select.EPOLLIN)
    pipe.send("listening")
    while True:
        for descriptor, _event in poll.poll():
            sockets[descriptor].recv(65536)


def parts(frame: bytes | str) -> list[bytes]:
    """Give the frames of a frame: several where it is a Batch."""
    assert isinstance(frame, bytes)
    if frame[0] != BATCH:
        return [frame]
    at, frames = 1, []
    while at < len(frame):
        (length,) = LENGTH.unpack_from(frame, at)
        frames.append(frame[at + 4 : at + 4 + length])
        at += 4 + length
    return frames


def batch(frames: list[bytes]) -> bytes:
    return bytes([BATCH]) + b"".join(LENGTH.pack(len(frame)) + frame for frame in frames)


def runner(port: int) -> connect:
    url = f"ws://127.0.0.1:{port}/runner"
    options: dict[str, Any] = {"proxy": None, "compression": None, "ping_interval": None, "max_size": None}
    return connect(url, subprotocols=["jobworker.2"], **options)  # type: ignore[list-item]


def hello(name: str, slots: int) -> bytes:
    return b"\x10" + json.dumps({"name": name, "slots": slots, "tags": [], "version": "0", "jobs": []}).encode()


async def answer(server: ClientConnection, frames: list[bytes]) -> None:
    """Say of each job that it starts, and of each that may start that it has ended."""
    replies = []
    for frame in frames:
        if frame[0] == ENQUEUE:
            replies.append(b"\x01" + frame[1:5] + b'{"attempt":1}')
        elif frame[0] == GO:
            replies.append(b"\x02" + frame[1:5] + b'{"attempt":1,"exit_code":0}')
    if replies:
        await server.send(batch(replies))


def answer_at_once(pipe: Any, port: int, slots: int, count: int) -> None:
    """A worker whose jobs take no time; send how many a second were settled, from its Hello on."""

    async def work() -> None:
        async with runner(port) as server:
            began, settled = time.perf_counter(), 0
            await server.send(hello("scripted", slots))
            while settled < count:
                frames = parts(await server.recv())
                settled += sum(frame[0] == SETTLED for frame in frames)
                await answer(server, frames)
            pipe.send(count / (time.perf_counter() - began))

    asyncio.run(work())


def many_workers(pipe: Any, port: int, count: int) -> None:
    """Connect workers whose jobs take no time; send the time when all have JobConfigs, each time that they have."""

    async def work() -> None:
        got, all_have, places = 0, asyncio.Event(), asyncio.Semaphore(50)

        async def listen_to(number_: int) -> None:
            nonlocal got
            async with places:
                server = await runner(port)
                await server.send(hello(f"idle-{number_}", 1))
                frames = parts(await server.recv())
            while True:
                got += frames[0][0] == CONFIGS
                if got % count == 0:
                    all_have.set()
                await answer(server, frames)
                frames = parts(await server.recv())

        workers = [asyncio.ensure_future(listen_to(number_)) for number_ in range(count)]
        while not any(worker.done() for worker in workers):
            await all_have.wait()
            all_have.clear()
            pipe.send(time.perf_counter())

    asyncio.run(work())


def bare_websockets(pipe: Any) -> None:
    """A server of the same frames that only counts: jobs from memory, no store. SIGHUP: JobConfigs to all."""
    configs = b"\x01" + json.dumps([{"command": None, "image": "busybox", "name": "empty"}] * 2).encode()
    workers: set[ServerConnection] = set()

    def enqueue(job: int) -> bytes:
        return struct.pack(">Biq", ENQUEUE, job, 5) + b'empty{"attempt":1,"environment":{}}'

    async def work(worker: ServerConnection) -> None:
        slots = json.loads((await worker.recv())[1:])["slots"]
        workers.add(worker)
        await worker.send(configs)
        if slots > 1:
            await worker.send(batch([enqueue(job) for job in range(slots)]))
        job = slots
        async for frames in worker:
            replies = []
            for frame in parts(frames):
                if frame[0] == RUNNING:
                    replies.append(bytes([GO]) + frame[1:5] + b"\0\0\0\1")
                else:
                    replies += [bytes([SETTLED]) + frame[1:5] + b"\0\0\0\1", enqueue(job)]
                    job += 1
            await worker.send(batch(replies))

    async def run() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: broadcast(workers, configs))
        options: dict[str, Any] = {"compression": None, "subprotocols": ["jobworker.2"], "ping_interval": 15}
        logging.getLogger("websockets").setLevel(logging.CRITICAL)
        async with serve(work, "127.0.0.1", 0, **options) as server:
            pipe.send(server.sockets[0].getsockname()[1])
            await server.wait_closed()

    asyncio.run(run())
